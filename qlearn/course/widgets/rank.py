"""The rank explorer: how much of a change to a matrix a thin pair B A of rank r can hold, and what the pair costs.

The **singular value decomposition** writes any matrix as a sum of matrices of rank 1, each with a size, its singular
value, from the largest to the smallest:

    D = s1 u1 v1' + s2 u2 v2' + ...

The first r of them are the best matrix of rank r (Eckart and Young, 1936): no other is nearer to D. What is left has
the squared size s(r+1)^2 + s(r+2)^2 + ... So the share that rank r keeps can be read off the singular values alone.

How fast they fall depends on where D comes from. In a change that training made a few are large. A rounding error is
nearly noise, and the singular values of noise fall slowly. "noise" is such a matrix, of the size of the first one.
"""

import ipywidgets
import torch

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure

NOISE = "noise"
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class RankExplorer(LivePlot):
    """Singular values, and the share that the first r of them hold, against r; see `rank_explorer`."""

    def __init__(self, changes):
        matrices = {str(name): measure.as_matrix(change) for name, change in changes.items()}
        if not matrices:
            raise ValueError("there is no change to look at; pass a dict such as {'fine-tuning': tuned - original}")
        first = next(iter(matrices.values()))
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
        matrices.setdefault(NOISE, noise * first.norm() / noise.norm())
        self.shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
        self.singular = {name: _singular_values(matrix) for name, matrix in matrices.items()}
        most = max(len(values) for values in self.singular.values())
        ranks = [r for r in RANKS if r <= most]
        start = max(r for r in ranks if r <= 16)
        controls = {
            "change": ipywidgets.Dropdown(options=list(matrices), description="the change"),
            "rank": ipywidgets.SelectionSlider(options=ranks, value=start, description="rank r"),
        }
        alt = (
            "Singular values of a change to a matrix from the largest to the smallest, the first r of them marked, and "
            "the share of the change that they hold, against the rank."
        )
        super().__init__(self._setup, self._update, figsize=(10, 3.4), alt=alt, name="RankExplorer", **controls)

    def kept(self, change, rank):
        """The share of the squared size of a change that the best matrix of a rank holds, 0 to 1."""
        squares = self.singular[change].square()
        return (squares[:rank].sum() / squares.sum()).item()

    def numbers(self, change, rank):
        """(how many numbers A and B have, that as a share of those of the matrix)."""
        rows, columns = self.shapes[change]
        return rank * (rows + columns), rank * (rows + columns) / (rows * columns)

    def _setup(self, figure):
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        most = max(len(values) for values in self.singular.values())
        left.set(title="its singular values", xlabel="place", ylabel="in units of the largest", xlim=(-2, most + 2))
        left.set_ylim(0, 1.08)
        (self._all,) = left.plot([], [], ".", markersize=4, color=plots.COLORS["faint"], label="left out")
        (self._first,) = left.plot([], [], ".", markersize=7, color=plots.COLORS["original"], label="in B A")
        left.legend(loc="upper right", markerscale=1.6)
        right.set(title="what a rank holds", xlabel="rank r", ylabel="% of the squared size", ylim=(0, 108))
        right.set_xscale("log", base=2)
        right.set_xlim(0.9, 1.15 * most)
        right.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        (self._noise,) = right.plot([], [], "--", color=plots.COLORS["faint"], label=NOISE)
        (self._curve,) = right.plot([], [], color=plots.COLORS["original"], label="the change")
        (self._dot,) = right.plot([], [], "o", markersize=8, color=plots.COLORS["marker"])
        right.legend(loc="upper left")
        return [self._all, self._first, self._noise, self._curve, self._dot]

    def _curve_of(self, change):
        squares = self.singular[change].square()
        return range(1, len(squares) + 1), (100 * squares.cumsum(0) / squares.sum()).tolist()

    def _update(self, change, rank):
        values = self.singular[change] / self.singular[change][0]
        rank = min(rank, len(values))
        self._all.set_data(range(rank + 1, len(values) + 1), values[rank:].tolist())
        self._first.set_data(range(1, rank + 1), values[:rank].tolist())
        self._noise.set_data(*self._curve_of(NOISE))
        self._curve.set_data(*self._curve_of(change))
        kept, (count, share) = self.kept(change, rank), self.numbers(change, rank)
        self._dot.set_data([rank], [100 * kept])
        rows, columns = self.shapes[change]
        return (
            f"{change}, {rows} x {columns}, rank {rank}: A and B have {count:,} numbers, {4 * count:,} bytes as "
            f"float32, {100 * share:.1f} % of the matrix's; they keep {100 * kept:.1f} % of the squared size, and "
            f"{100 * (1 - kept) ** 0.5 if kept < 1 else 0:.0f} % of the size is left"
        )


@measure.one_thread
def _singular_values(matrix):
    """float64 (min(rows, columns),), from the largest to the smallest."""
    return torch.linalg.svdvals(matrix.double())


def rank_explorer(changes=None):
    """Drag the rank of an adapter, and see how much of a real change to a matrix it could hold.

    changes: dict name -> matrix (rows, columns), a difference of two weights; by default one of rank 4 under a little
    noise. "noise", a normal random matrix of the first one's size, is there beside them.
    Raises ValueError for an empty dict, for what is no finite matrix, and for a matrix of zeros.
    """
    if changes is None:
        generator = torch.Generator().manual_seed(1)
        thin = torch.randn(128, 4, generator=generator) @ torch.randn(4, 256, generator=generator)
        changes = {"rank 4, and noise": thin + 0.5 * torch.randn(128, 256, generator=generator)}
    return RankExplorer(changes)
