"""What each expert reads, against a computation of it by hand."""

import pytest
import torch

from qlearn.methods.statistics import InputStatistics
from qlearn.models.calibration import Block, walk
from qlearn.models.expert_inputs import collect_expert_inputs
from qlearn.models.experts import expert_parameters
from tests.models.mixtures import MIXTURES, make_mixture

IDS = torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(0))


def routed(block, experts):
    """The arguments of the module of experts, for each call of the block."""
    seen = []
    handle = experts.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    block.run()
    handle.remove()
    return seen


def by_hand(experts, arguments):
    """For each expert the inputs of its first matrix, and of its second one."""
    for number in range(4):
        x = torch.cat([hidden[(chosen == number).any(-1)] for hidden, chosen, _ in arguments])
        if experts.is_transposed:
            middle = experts._apply_gate(x @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number])
        else:
            gate, up = (x @ experts.gate_up_proj[number].T).chunk(2, -1)
            middle = experts.act_fn(gate) * up
        yield x, middle


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["deepseek v3", "gpt-oss"])
def test_the_inputs_of_each_expert(family, way):
    model = make_mixture(family)
    model.set_experts_implementation(way)
    *_, block = walk(model, IDS, batch=2)
    experts = block.module.mlp.experts
    expected = list(by_hand(experts, routed(block, experts)))
    for place, name in enumerate(("gate_up_proj", "down_proj")):
        columns = expected[0][place].shape[1]
        found = collect_expert_inputs(block, experts, name, columns, range(4))
        for number, statistics in found.items():
            by_itself = InputStatistics.from_inputs(expected[number][place])
            assert statistics.count == by_itself.count
            torch.testing.assert_close(statistics.hessian, by_itself.hessian, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(statistics.abs_max, by_itself.abs_max, rtol=1e-5, atol=1e-6)
        assert sum(statistics.count for statistics in found.values()) == 2 * IDS.numel()  # two experts a token


def test_all_experts_at_once():
    """Llama 4 gives every expert all tokens, as zeros where they are not for it."""
    model = make_mixture("llama 4")
    *_, block = walk(model, IDS, batch=2)
    experts = block.module.feed_forward.experts
    calls = [hidden.view(4, -1, 32) for (hidden,) in routed(block, experts)]
    for number, statistics in collect_expert_inputs(block, experts, "gate_up_proj", 32, range(4)).items():
        x = torch.cat([hidden[number] for hidden in calls])
        x = x[x.any(-1)]
        assert statistics.count == len(x)
        torch.testing.assert_close(statistics.hessian, 2 / len(x) * x.T @ x, rtol=1e-5, atol=1e-6)
        middle = (x @ experts.gate_up_proj[number]).chunk(2, -1)
        middle = middle[1] * experts.act_fn(middle[0])
        found = collect_expert_inputs(block, experts, "down_proj", 16, [number])
        assert found.keys() == {number}
        torch.testing.assert_close(found[number].hessian, 2 / len(x) * middle.T @ middle, rtol=1e-5, atol=1e-6)
    assert sum(len(hidden[number][hidden[number].any(-1)]) for hidden in calls for number in range(4)) == IDS.numel()


@pytest.mark.parametrize("family", MIXTURES)
def test_the_module_is_as_it_was(family):
    model = make_mixture(family)
    before = model(input_ids=IDS).logits
    parameters = dict(model.named_parameters())
    *_, block = walk(model, IDS)
    for module, name in expert_parameters(block.module).values():
        columns = module._parameters[name].shape[1 if family != "deepseek v3" else 2]
        collect_expert_inputs(block, module, name, columns, range(4))
        with pytest.raises(ValueError, match="do not fit a layer of 3 columns"):
            collect_expert_inputs(block, module, name, 3, range(4))
        assert not {"forward", name} & vars(module).keys()
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_forward_that_does_something_else_tells_nothing():
    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.ones(2, 4, 4))

        def forward(self, x):
            return torch.einsum("bi,eoi->bo", x, self.experts)

    module = Mixture()
    block = Block("block", module, [((torch.ones(3, 4),), {})])
    found = collect_expert_inputs(block, module, "experts", 4, range(2))
    assert [statistics.count for statistics in found.values()] == [0, 0]
