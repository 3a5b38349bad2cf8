"""GPTQ against Optimal Brain Quantization done by hand, against brute force, and against round-to-nearest."""

import itertools
import warnings

import numpy as np
import pytest
import torch

from qlearn.evaluate import calibration_text
from qlearn.methods import absmax, zero_point
from qlearn.methods.gptq import gptq, gptq_steps
from qlearn.methods.statistics import InputStatistics
from qlearn.models import load_model

ORDERS = (False, "static", "group")


def problem(rows=6, columns=12, tokens=40, seed=0):
    """A weight, and inputs whose channels are correlated and of different sizes: (rows, columns), (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.linspace(0.5, 2, columns)[torch.randperm(columns, generator=generator)]
    return weight, torch.randn(tokens, columns, generator=generator) @ mix * sizes


def output_error(weight, back, hessian):
    """tr (W − Q) H (W − Q)ᵀ in float64."""
    off = (weight - back).double()
    return (off @ hessian.double() * off).sum().item()


# ---- the exact method, one weight at a time, in NumPy ---------------------------------------------------------------


def float16_not_below(x):
    half = np.float16(x)
    return float(half if float(half) >= x else np.nextafter(half, np.float16(np.inf)))


def grid_of(weights, bits, sym):
    """(scale, zero, lowest code, highest code) of one group of one row."""
    low, high = min(0.0, weights.min()), max(0.0, weights.max())
    if sym:
        qmax = 2 ** (bits - 1) - 1
        return float16_not_below(max(-low, high) / qmax), 0, -qmax, qmax
    scale = float16_not_below((high - low) / (2**bits - 1))
    return scale, round(-low / scale), 0, 2**bits - 1


def visiting_order(hessian, act_order, group):
    """The columns by falling H_ii: all together, or within their groups and these by their largest."""
    size, columns = np.diag(hessian), range(len(hessian))
    if act_order == "static":
        return sorted(columns, key=lambda i: -size[i])
    groups = [sorted(columns[k : k + group], key=lambda i: -size[i]) for k in columns[::group]]
    groups.sort(key=lambda members: -size[members[0]])
    return list(itertools.chain(*groups)) if act_order == "group" else list(columns)


def exact_obq(weight, hessian, bits, group, sym=False, act_order=False, static=False, percdamp=0.01):
    """Optimal Brain Quantization in a fixed order, row by row; the inverse is computed anew from H for every weight.

    Returns codes (rows, columns) and the weights (rows, columns) of each step, as a list over columns.
    """
    H = np.array(hessian, np.float64)
    order = visiting_order(H, act_order, group)
    H += percdamp * np.diag(H).mean() * np.eye(len(H))
    codes, history = np.zeros(weight.shape, int), [np.empty(weight.shape) for _ in order]
    for row, w in enumerate(np.array(weight, np.float64)):
        original, left, grids = w.copy(), sorted(order), {}
        for turn, i in enumerate(order):
            k = i // group * group
            if k not in grids:
                source = original if static or act_order == "static" else w
                grids[k] = grid_of(source[k : k + group], bits, sym)
            scale, zero, low, high = grids[k]
            code = min(max(np.rint(w[i] / scale) + zero, low), high)
            inverse = np.linalg.inv(H[np.ix_(left, left)])
            at = left.index(i)
            q = (code - zero) * scale
            w[left] -= (w[i] - q) / inverse[at, at] * inverse[at]
            codes[row, i], w[i] = code, q
            left.remove(i)
            history[turn][row] = w
    return codes, history


CASES = [
    {"group": group, "sym": sym, "act_order": act_order, "static": static}
    for group in (4, 12)
    for sym in (False, True)
    for act_order in ORDERS
    for static in (False, True)
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_the_exact_method(bits, case):
    for seed in range(3):
        weight, x = problem(seed=seed)
        statistics = InputStatistics.from_inputs(x)
        exact, _ = exact_obq(weight.numpy(), statistics.hessian.numpy(), bits, **case)
        options = {"sym": case["sym"], "act_order": case["act_order"], "static_groups": case["static"]}
        ours = gptq(weight, bits, case["group"], inputs=statistics, **options)
        assert ours.codes().tolist() == exact.tolist()
        steps = list(gptq_steps(weight, statistics.hessian, bits, case["group"], **options))
        assert torch.stack([s.codes for s in sorted(steps)], 1).tolist() == exact.tolist()


@pytest.mark.parametrize("act_order", ORDERS)
def test_every_step_leaves_the_weights_of_the_exact_method(act_order):
    weight, x = problem(4, 8)
    hessian = InputStatistics.from_inputs(x).hessian
    _, history = exact_obq(weight.numpy(), hessian.numpy(), 3, 4, act_order=act_order)
    steps = list(gptq_steps(weight, hessian, 3, 4, act_order=act_order))
    assert [step.column for step in steps] == visiting_order(hessian.numpy(), act_order, 4)
    for step, expected in zip(steps, history, strict=True):
        np.testing.assert_allclose(step.weight, expected, rtol=1e-5, atol=1e-5)
        assert step.loss == pytest.approx(output_error(weight, step.weight, hessian), rel=1e-4)


# ---- what the best answer is -----------------------------------------------------------------------------------------


def test_the_columns_left_are_where_the_error_is_smallest():
    """The minimum over the free columns, by least squares on the inputs themselves: no Hessian, no inverse."""
    weight, x = problem(3, 6)
    for step in gptq_steps(weight, InputStatistics.from_inputs(x).hessian, bits=3, percdamp=0):
        if step.column == 5:
            break
        free = slice(step.column + 1, None)
        target = x[:, : step.column + 1].double() @ (weight - step.weight)[:, : step.column + 1].double().T
        shift = torch.linalg.lstsq(x[:, free].double(), target).solution
        expected = weight[:, free].double() + shift.T
        torch.testing.assert_close(step.weight[:, free].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("free", [2, 3])
def test_against_all_codes_there_are(free):
    """A first weight spans the grid and is stored exactly; the others share its grid, and all their codes are tried.

    With the earlier codes as they are, the last one is the best there is. So with two weights that are not exact,
    round-to-nearest is never better; with three, greedy choices can lose, but never go below the optimum.
    """
    wins, all_codes = 0, torch.cartesian_prod(*[torch.arange(-3, 4)] * (free + 1))
    for seed in range(20):
        weight, x = problem(1, free + 1, seed=seed)
        weight[0, 0] = 3 * weight.abs().max()
        x[:, -2] += 3 * x[:, -1]  # so an error of the last but one calls for a threefold shift of the last
        options = {"bits": 3, "scale_dtype": torch.float32}
        qt, nearest = gptq(weight, inputs=x, percdamp=0, sym=True, **options), absmax(weight, **options)
        errors = (x.double() @ (weight - all_codes * qt.scales).double().T).square().sum(0)
        error = dict(zip(map(tuple, all_codes.tolist()), errors.tolist(), strict=True))
        ours, theirs = (tuple(q.codes()[0].tolist()) for q in (qt, nearest))
        assert error[ours] <= min(error[*ours[:-1], last] for last in range(-3, 4)) * (1 + 1e-5)
        assert free > 2 or error[ours] <= error[theirs] * (1 + 1e-5)
        wins += error[ours] < error[theirs]
    assert wins >= 5


@pytest.mark.parametrize("percdamp", [0.01, 0.3])
def test_the_error_is_the_sum_of_the_steps(percdamp):
    """(w − q)² / [H_F⁻¹]_ii adds up to the error of the damped problem, which is what U is there to make small."""
    weight, x = problem(8, 24, tokens=100)
    hessian = InputStatistics.from_inputs(x).hessian
    damped = hessian + percdamp * hessian.diagonal().mean() * torch.eye(24)
    grown, before = 0.0, weight
    for step in gptq_steps(weight, hessian, 3, 8, percdamp=percdamp):
        left = damped[step.column :, step.column :].double()
        off = (before[:, step.column] - step.quantized).double()
        grown += (off.square().sum() / torch.linalg.inv(left)[0, 0]).item()
        before = step.weight
    back = gptq(weight, 3, 8, inputs=x, percdamp=percdamp).dequantize()
    assert grown == pytest.approx(output_error(weight, back, damped), rel=1e-4)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("options", [{}, {"act_order": "static"}, {"act_order": "group"}, {"clip": "mse"}], ids=str)
def test_channels_that_are_independent_make_it_round_to_nearest(sym, options):
    weight, _ = problem(16, 64)
    inputs = InputStatistics.from_inputs(torch.eye(64) * torch.linspace(1, 3, 64))
    for bits, group in itertools.product((2, 3, 4, 8), (None, 16)):
        ours = gptq(weight, bits, group, inputs=inputs, sym=sym, **options)
        nearest = (absmax if sym else zero_point)(weight, bits, group, clip=options.get("clip", "minmax"))
        assert ours.format == nearest.format and ours.block == nearest.block and ours.nbytes == nearest.nbytes
        assert ours.state_tensors().keys() == nearest.state_tensors().keys()
        for name, tensor in nearest.state_tensors().items():
            assert torch.equal(getattr(ours, name), tensor)


# ---- the fast form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("group", [None, 8, 32])
def test_blocks_change_nothing(group, act_order):
    weight, x = problem(5, 96, tokens=400)
    hessian = InputStatistics.from_inputs(x).hessian
    steps = sorted(gptq_steps(weight, hessian, 3, group, act_order=act_order))
    expected = torch.stack([step.codes for step in steps], 1)
    for blocksize in (1, 20, 32, 128):
        ours = gptq(weight, 3, group, inputs=x, act_order=act_order, blocksize=blocksize)
        assert torch.equal(ours.codes().float(), expected)


@pytest.mark.parametrize("act_order", ORDERS)
def test_a_stack_is_treated_like_its_members(act_order):
    pairs = [problem(5, 32, tokens=100, seed=seed) for seed in range(3)]
    stack = gptq(torch.stack([w for w, _ in pairs]), 3, 8, inputs=[x for _, x in pairs], act_order=act_order)
    for quantized, (weight, x) in zip(stack, pairs, strict=True):
        alone = gptq(weight, 3, 8, inputs=x, act_order=act_order)
        assert torch.equal(quantized.codes(), alone.codes()) and torch.equal(quantized.scales, alone.scales)


def test_true_means_static():
    weight, x = problem(5, 32, tokens=100)
    static = gptq(weight, 3, 8, inputs=x, act_order="static").codes()
    assert torch.equal(gptq(weight, 3, 8, inputs=x, act_order=True).codes(), static)
    assert not torch.equal(gptq(weight, 3, 8, inputs=x).codes(), static)


def test_neither_the_weight_nor_the_statistics_are_touched():
    weight, x = problem()
    statistics = InputStatistics.from_inputs(x)
    hessian, original = statistics.hessian.clone(), weight.clone()
    gptq(weight, 4, inputs=statistics)
    list(gptq_steps(weight, statistics.hessian))
    assert torch.equal(statistics.hessian, hessian) and torch.equal(weight, original)


# ---- the bundled model -----------------------------------------------------------------------------------------------


GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # of equal inputs


@pytest.fixture(scope="module")
def bundled():
    """Layers that read the same, and the Hessian of 4,096 tokens: list of (dict name -> weight, InputStatistics)."""
    model, tokenizer = load_model(progress=False)
    found = []
    for block in model.model.layers:
        layers = {name.rpartition(".")[2]: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        for names in GROUPS:
            statistics = InputStatistics(layers[names[0]].in_features, sample=0)
            layers[names[0]].register_forward_pre_hook(lambda _, args, statistics=statistics: statistics.add(args[0]))
            found.append(({name: layers.pop(name).weight.detach() for name in names}, statistics))
        assert not layers
    ids = torch.tensor(tokenizer(calibration_text()[:40_000], verbose=False)["input_ids"][:4096]).view(-1, 512)
    with torch.no_grad():
        model.model(ids)
    return found


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_no_layer_loses_to_round_to_nearest(bundled, bits):
    """Not one of the 56, and the mean is well below: 0.4 to 0.5 of the error was measured."""
    ratios = []
    for weights, statistics in bundled:
        together = torch.cat(list(weights.values()))  # rows do not disturb each other
        ours, nearest = gptq(together, bits, 64, inputs=statistics), zero_point(together, bits, 64)
        assert ours.bits_per_weight == nearest.bits_per_weight
        sizes = [len(weight) for weight in weights.values()]
        errors = [
            [output_error(*pair, statistics.hessian) for pair in zip(weights.values(), back.split(sizes), strict=True)]
            for back in (ours.dequantize(), nearest.dequantize())
        ]
        ratios += [a / b for a, b in zip(*errors, strict=True)]
    assert len(ratios) == 56
    assert max(ratios) <= 1
    assert sum(ratios) / 56 < 0.6


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", ORDERS)
class TestInputsAtTheEdge:
    def test_a_dead_column_is_rounded_to_nearest_and_disturbs_nobody(self, act_order):
        weight, x = problem()
        x[:, 5] = 0
        weight[:, 5] = weight[:, :5].amax(1)
        options = {"inputs": x, "act_order": act_order, "static_groups": True}
        qt = gptq(weight, 4, 6, **options)
        assert torch.equal(qt.codes()[:, 5], zero_point(weight, 4, 6).codes()[:, 5])
        changed, others = weight.clone(), torch.arange(12) != 5
        changed[:, 5] = weight[:, :5].mean(1)  # as before within the range of the others, so the grid stays
        assert torch.equal(gptq(changed, 4, 6, **options).codes()[:, others], qt.codes()[:, others])

    @pytest.mark.parametrize("n", [0, 7])
    def test_no_input_but_zeros_is_round_to_nearest_and_is_said(self, act_order, n):
        weight, _ = problem()
        with pytest.warns(UserWarning, match="1 of 1 weights of 12 columns got no calibration input"):
            qt = gptq(weight, 4, 4, inputs=torch.zeros(n, 12), act_order=act_order)
        assert torch.equal(qt.dequantize(), zero_point(weight, 4, 4).dequantize())

    def test_a_single_token(self, act_order):
        """H has rank 1. All that matters is one sum for each row, and little of its error is left."""
        weight, x = problem(tokens=1)
        hessian = InputStatistics.from_inputs(x).hessian
        qt = gptq(weight, 4, inputs=x, act_order=act_order)
        nearest = output_error(weight, zero_point(weight, 4).dequantize(), hessian)
        assert output_error(weight, qt.dequantize(), hessian) < 0.5 * nearest

    def test_channels_that_are_copies(self, act_order):
        """Singular H: the sum of the copies' weights is all that matters."""
        weight, x = problem(tokens=400)
        x = x[:, torch.arange(12) // 3]
        hessian = InputStatistics.from_inputs(x).hessian
        qt = gptq(weight, 3, inputs=x, act_order=act_order)
        nearest = output_error(weight, zero_point(weight, 3).dequantize(), hessian)
        assert output_error(weight, qt.dequantize(), hessian) < 0.5 * nearest

    def test_copies_without_damping_are_damped_with_a_warning(self, act_order):
        weight, x = problem(tokens=400)
        x = x[:, torch.arange(12) // 3]
        with pytest.warns(UserWarning, match=r"copies or sums of others, .* raised from 0 to 0\.01"):
            ours = gptq(weight, 3, inputs=x, act_order=act_order, percdamp=0)
        assert torch.equal(ours.codes(), gptq(weight, 3, inputs=x, act_order=act_order).codes())

    @pytest.mark.parametrize("size", [1e-12, 1e12])
    def test_the_size_of_the_inputs_does_not_matter(self, act_order, size):
        weight, x = problem()
        options = {"act_order": act_order}
        scaled = gptq(weight, 3, 4, inputs=x * size, **options)
        assert torch.equal(scaled.codes(), gptq(weight, 3, 4, inputs=x, **options).codes())


def test_one_silent_expert_among_others():
    weight, x = problem()
    with pytest.warns(UserWarning, match="1 of 2 weights"):
        spoken, silent = gptq(torch.stack([weight, weight]), 4, inputs=[x, torch.zeros(0, 12)])
    assert torch.equal(spoken.codes(), gptq(weight, 4, inputs=x).codes())
    assert torch.equal(silent.codes(), zero_point(weight, 4).codes())


@pytest.mark.parametrize("sym", [False, True])
class TestWeightsAtTheEdge:
    def test_one_row(self, sym):
        weight, x = problem(3)
        alone = gptq(weight[1:2], 3, 4, inputs=x, sym=sym)
        assert torch.equal(alone.codes(), gptq(weight, 3, 4, inputs=x, sym=sym).codes()[1:2])

    def test_one_column(self, sym):
        weight, x = problem(4, 1)
        ours, nearest = gptq(weight, 3, inputs=x, sym=sym), (absmax if sym else zero_point)(weight, 3)
        assert torch.equal(ours.codes(), nearest.codes())

    def test_zeros_stay_zeros(self, sym):
        _, x = problem()
        assert not gptq(torch.zeros(6, 12), 3, 4, inputs=x, sym=sym).dequantize().any()

    @pytest.mark.parametrize("value", [2.0, -3.0, 1e-3])
    def test_a_constant_comes_back(self, sym, value):
        """Its grid holds it all but exactly, so no error is there to be passed on."""
        _, x = problem()
        weight = torch.full((6, 12), value)
        back = gptq(weight, 4, inputs=x, sym=sym, scale_dtype=torch.float32).dequantize()
        torch.testing.assert_close(back, weight, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_float_dtype_is_accepted(self, sym, dtype):
        weight, x = problem()
        weight = weight.to(dtype)
        ours = gptq(weight, 4, 4, inputs=x, sym=sym)
        assert torch.equal(ours.codes(), gptq(weight.float(), 4, 4, inputs=x, sym=sym).codes())
        assert ours.scales.dtype == torch.float16


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": 1}, "bits=1 is out of range"),
        ({"bits": 9}, "bits=9 is out of range"),
        ({"group_size": 5}, "group_size=5 does not divide the 12 columns"),
        ({"act_order": "desc"}, "act_order='desc' is unknown; choose False, 'static' or 'group'"),
        ({"percdamp": -1}, "percdamp=-1 is no share"),
        ({"blocksize": 0}, "blocksize=0 is no number of columns"),
        ({"clip": "best"}, "clip='best' is unknown"),
        ({"inputs": torch.ones(4, 11)}, "inputs of 11 channels do not fit a weight of 12 columns"),
        ({"inputs": torch.full((4, 12), float("nan"))}, "48 of 48 inputs are NaN"),
        ({"inputs": torch.full((4, 12), 1e25)}, "the Hessian holds NaN or infinity"),
        ({"inputs": InputStatistics(12, hessian=False)}, "GPTQ needs hessian=True"),
        ({"weight": torch.full((2, 12), float("nan"))}, "24 of 24 weights are not finite"),
        ({"weight": torch.ones(12)}, r"shape \(12,\) is no matrix"),
        ({"weight": torch.ones(3, 2, 12), "inputs": [torch.ones(4, 12)]}, "1 inputs were given for 3 matrices"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    weight, x = problem()
    with pytest.raises(ValueError, match=message):
        gptq(**{"weight": weight, "inputs": x} | arguments)


def test_a_hessian_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"shape \(11, 11\) does not fit 12 columns"):
        next(gptq_steps(torch.ones(2, 12), torch.eye(11)))


def test_ordinary_inputs_raise_no_warning():
    weight, x = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gptq(weight, 4, inputs=x)
