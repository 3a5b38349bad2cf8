# %% [markdown]
# # A sample exercise

# %%
import os

import numpy as np

from qlearn import course

course.tasks.__path__.append(os.environ["SAMPLE_TASKS"])

# %% [markdown] qlearn={"card": "grid.scale"}
# Write `scale(x, bits)`.

# %% qlearn={"answer": "grid.scale"}
def scale(x, bits):
    """The distance between two rulings."""
    ### BEGIN SOLUTION
    if bits < 2:
        raise ValueError("too few bits")
    return np.abs(x).max() / (2 ** (bits - 1) - 1)
    ### END SOLUTION

# %% qlearn={"check": "grid.scale"}
course.check("grid.scale", scale)

# %% qlearn={"check": "grid.scale", "hidden": true}
print(f"{scale(np.array([3.5, -7.0]), 4):.3f}")

# %% [markdown] qlearn={"card": "grid.codes"}
# Write `codes(x, bits)`, with your `scale`.

# %% qlearn={"answer": "grid.codes"}
def codes(x, bits):
    ### BEGIN SOLUTION
    return np.round(x / scale(x, bits)).astype(np.int8)
    ### END SOLUTION

# %% qlearn={"check": "grid.codes"}
course.check("grid.codes", codes)

# %%
print("a given cell in between:", codes(np.ones(2), 2))

# %% qlearn={"answer": "grid.levels"}
### BEGIN SOLUTION
levels = 15
### END SOLUTION

# %% qlearn={"check": "grid.levels"}
course.check("grid.levels", levels)
