"""Damping: what it adds, when it is raised, and what is said then."""

import warnings

import pytest
import torch

from qlearn.methods.hessian import damped_cholesky, normalize


def gram(tokens, columns, seed=0):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return 2 / tokens * x.T @ x


def copies(columns=4):
    """Every channel the same: one direction was seen, and columns - 1 were not."""
    return torch.ones(columns, columns)


class TestNormalize:
    def test_the_mean_of_the_living_diagonal_becomes_one(self):
        hessian = 1e-9 * gram(50, 6)
        hessian[2], hessian[:, 2] = 0, 0
        ours = normalize(hessian.clone())
        living = [0, 1, 3, 4, 5]
        assert ours.diagonal()[living].mean().item() == pytest.approx(1, rel=1e-6)
        ratio = ours[living][:, living] / hessian[living][:, living]
        torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()))

    def test_a_dead_column_stands_alone(self):
        hessian = gram(50, 4)
        hessian[1], hessian[:, 1] = 0, 0
        assert normalize(hessian)[1].tolist() == [0, 1, 0, 0]

    def test_all_dead_is_the_identity(self):
        assert torch.equal(normalize(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, 3, 3))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_refused(self, value):
        with pytest.raises(ValueError, match="NaN or infinity: the inputs overflow float32"):
            normalize(torch.tensor([[1.0, 0.0], [0.0, value]]))


class TestDamping:
    def test_it_adds_that_share_of_the_mean_and_factors(self):
        hessian = normalize(gram(100, 8))[None]
        damped = hessian.clone()
        factor = damped_cholesky(damped, percdamp=0.05)
        torch.testing.assert_close(damped, hessian + 0.05 * torch.eye(8))
        torch.testing.assert_close(factor @ factor.mT, damped)
        assert not factor.triu(1).any()

    def test_enough_damping_is_left_alone(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            damped_cholesky(copies()[None], percdamp=0.01)

    @pytest.mark.parametrize("percdamp, expected", [(0, 0.01), (1e-9, 0.01)])
    def test_too_little_is_raised_with_an_explanation(self, percdamp, expected):
        hessian = copies()[None]
        with pytest.warns(UserWarning, match=rf"copies or sums .* raised from {percdamp:g} to {expected}"):
            damped_cholesky(hessian, percdamp)
        torch.testing.assert_close(hessian[0], copies() + expected * torch.eye(4))

    def test_it_goes_up_tenfold(self):
        """The smallest eigenvalue is -0.05: 0.01 is not enough, 0.1 is."""
        with pytest.warns(UserWarning, match="raised from 0.01 to 0.1"):
            damped_cholesky(torch.tensor([[[1.0, 1.05], [1.05, 1.0]]]))

    def test_too_few_tokens_are_named(self):
        with pytest.warns(UserWarning, match="12 columns cannot be inverted .* 5 tokens are fewer than its columns"):
            damped_cholesky(normalize(gram(5, 12))[None], percdamp=0, counts=[5])

    def test_only_the_one_that_fails_is_changed(self):
        good, bad = normalize(gram(100, 4)), copies()
        both = torch.stack([good, bad])
        with pytest.warns(UserWarning, match="1 of 2 Hessians of 4 columns"):
            damped_cholesky(both, percdamp=0, counts=[100, 100])
        assert torch.equal(both[0], good)

    def test_what_is_no_hessian_is_refused(self):
        with pytest.raises(ValueError, match=r"The Hessian of 2 columns .* Not even percdamp=1 mends it"):
            damped_cholesky(torch.tensor([[[1.0, 3.0], [3.0, 1.0]]]))

    @pytest.mark.parametrize("percdamp", [-0.1, float("nan"), float("inf"), "auto", None])
    def test_a_bad_percdamp_is_named(self, percdamp):
        with pytest.raises(ValueError, match=f"percdamp={percdamp!r} is no share"):
            damped_cholesky(torch.eye(2)[None], percdamp)
