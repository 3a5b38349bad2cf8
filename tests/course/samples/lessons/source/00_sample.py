# %% [markdown]
# # A sample lesson

# %%
import sys
import time

from IPython.display import display
from tqdm.auto import tqdm

# %% tags=["nbval-check-output"]
print("\x1b[31mred\x1b[0m", 2**7)
print("to stderr", file=sys.stderr)
print("again", sys.prefix)

# %%
import ipywidgets

display(ipywidgets.IntSlider(4, description="bits"))
for _ in tqdm(range(2)):
    time.sleep(0.01)
for _ in tqdm(range(2), file=sys.stderr, ncols=60):
    pass
