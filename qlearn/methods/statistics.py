"""What calibration remembers of a layer's inputs.

Round-to-nearest looks at the weights alone. GPTQ and AWQ also ask which weights matter, and that depends on what flows
through the layer: a weight that is multiplied by large inputs must be stored with care, one whose input is always 0
hardly at all. So a few thousand tokens are sent through the model, and each layer notes what it is given.

The inputs themselves are far too many to keep (16,384 tokens of 4,096 channels are 268 MB, for one layer). What the
methods need of them is smaller, and can be summed up batch by batch:

    hessian     (2 / n) Σ x xᵀ     how strongly two channels are large together: in the error of the layer's output,
                                   Σ ‖(W − Q) x‖², it is all that the inputs contribute
    mean_abs    mean |x|           how large a channel is
    abs_max     max |x|            and how large it gets
    sample      some of the x      to try a candidate out on

The name Hessian is GPTQ's: it is the matrix of second derivatives of that error with respect to one row of W.

**An even spread.** The sample must not favour a position: the first token of a window is often an outlier in every
layer, and each 32nd token of windows of 512 would contain it sixteen times too often. So token number i gets the key
i · φ mod 1, φ the golden ratio, and the tokens with the smallest keys are kept. Multiples of φ fill the unit interval
more evenly than chance would, so the kept tokens lie evenly spread as well, in step with nothing, and the same in
every run.
"""

import torch

_GOLDEN = 2654435769  # 2**32 divided by the golden ratio: keys are integers below 2**32 instead of fractions
_KEYS = 2**32


class InputStatistics:
    """The running statistics of the inputs of one layer.

    in_features: width of the inputs.
    hessian: whether to accumulate the (in_features, in_features) matrix, the only large part.
    sample: how many inputs to keep whole.
    device: where the statistics are held; None follows the first inputs.

    count: how many inputs (tokens) have been seen.
    mean_abs, abs_max: float32 (in_features,).
    hessian: float32 (in_features, in_features), (2 / count) Σ x xᵀ; None when it was not asked for.
    sample: float32 (min(count, sample), in_features).

    Source of the Hessian: GPTQ (arXiv 2210.17323), section 3.3.

    >>> statistics = InputStatistics(2)
    >>> statistics.add(torch.tensor([[1.0, 0.0], [3.0, -2.0]]))
    >>> statistics.add(torch.tensor([[[2.0, 0.5]]]))
    >>> statistics.count, statistics.mean_abs, statistics.abs_max
    (3, tensor([2.0000, 0.8333]), tensor([3., 2.]))
    >>> statistics.hessian                              # 2/3 of [[1 + 9 + 4, -6 + 1], [-6 + 1, 4 + 0.25]]
    tensor([[ 9.3333, -3.3333],
            [-3.3333,  2.8333]])
    """

    def __init__(self, in_features, hessian=True, sample=512, device=None):
        self.in_features, self.count = in_features, 0
        self._wants_hessian, self._sample_size, self._follows_inputs = hessian, sample, device is None
        self._allocate(torch.device(device or "cpu"))

    @classmethod
    def from_inputs(cls, x, **options):
        """The statistics of inputs that are all at hand: x is floating point (..., in_features).

        >>> InputStatistics.from_inputs(torch.ones(10, 4), hessian=False, sample=3).sample.shape
        torch.Size([3, 4])
        """
        x = torch.as_tensor(x)
        statistics = cls(x.shape[-1] if x.dim() else 0, **options)
        statistics.add(x)
        return statistics

    @torch.no_grad()
    def add(self, x):
        """Take in more inputs.

        x: floating point (..., in_features); no tokens at all are fine, for an expert that nothing was sent to.
        Raises ValueError for another width and for NaN or infinity; then the statistics are as they were.
        """
        x = self._checked(x)
        if not len(x):
            return
        if self._follows_inputs and self.count == 0 and x.device != self.device:
            self._allocate(x.device)
        x = x.to(self.device)
        old = self.count / (self.count + len(x))
        new = 1 / (self.count + len(x))
        size = x.abs()
        self.mean_abs.mul_(old).add_(size.sum(0), alpha=new)
        torch.maximum(self.abs_max, size.amax(0), out=self.abs_max)
        if self.hessian is not None:
            self.hessian.addmm_(x.T, x, beta=old, alpha=2 * new)
        self._spread(x)
        self.count += len(x)

    def _checked(self, x):
        """x as float32 (tokens, in_features)."""
        if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs of shape {tuple(x.shape)} and {x.dtype} do not fit a layer of {self.in_features} columns; "
                f"pass floating-point inputs (..., {self.in_features})"
            )
        x = x.detach().reshape(-1, self.in_features).float()
        if not torch.isfinite(x).all():
            raise ValueError(
                f"{int((~torch.isfinite(x)).sum())} of {x.numel()} inputs are NaN or infinite; the model overflows "
                "before this layer, so calibrate it in bfloat16 or float32"
            )
        return x

    def _allocate(self, device):
        """Start from zeros on a device; a layer that never sees an input keeps them."""
        n = self.in_features
        self.device = device
        self.mean_abs, self.abs_max = torch.zeros(n, device=device), torch.zeros(n, device=device)
        self.hessian = torch.zeros(n, n, device=device) if self._wants_hessian else None
        self.sample = torch.zeros(0, n, device=device)
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)

    def _spread(self, x):
        """Keep the inputs with the smallest keys."""
        keys = torch.arange(self.count, self.count + len(x), device=x.device) * _GOLDEN % _KEYS
        full = len(self._keys) == self._sample_size
        limit = self._keys.max() if full and self._sample_size else _KEYS
        keep = keys < limit
        keys, rows = torch.cat([self._keys, keys[keep]]), torch.cat([self.sample, x[keep]])
        smallest = keys.topk(min(self._sample_size, len(keys)), largest=False).indices.sort().values
        self._keys, self.sample = keys[smallest], rows[smallest]

    def __repr__(self):
        return f"InputStatistics({self.count} inputs of {self.in_features} channels)"


def statistics_of(inputs, *weights):
    """Inputs as InputStatistics, or a ValueError when they do not fit the weights that read them.

    inputs: an InputStatistics, or floating point (tokens, columns).  weights: matrices (rows, columns).

    >>> statistics_of(torch.ones(3, 4), torch.ones(2, 5))
    Traceback (most recent call last):
    ...
    ValueError: inputs of 4 channels do not fit a weight of 5 columns; pass this layer's own
    """
    if not isinstance(inputs, InputStatistics):
        inputs = InputStatistics.from_inputs(torch.as_tensor(inputs))
    for weight in weights:
        if weight.shape[1] != inputs.in_features:
            raise ValueError(
                f"inputs of {inputs.in_features} channels do not fit a weight of {weight.shape[1]} columns; pass this "
                "layer's own"
            )
    if not inputs.count:
        raise ValueError("there are no inputs to learn from; calibrate with more or other text, or use zero_point")
    return inputs
