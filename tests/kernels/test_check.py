"""What a tensor holds is refused on the CPU, where it costs no wait, and where it counts."""

import pytest
import torch

from tetrad.kernels import reference


@pytest.mark.parametrize("wrong", [0.0, -1.0, torch.inf, torch.nan])
def test_temperatures(wrong) -> None:
    x, y = torch.randn(2, 3, 7)
    tokens, mask = torch.tensor([1, -100, 2]), torch.tensor([1, 0, 1])
    t = torch.tensor([1.0, wrong, 1.0])
    reference.token_logprobs(x, tokens, temperature=t)
    reference.exact_kl(x, y, temperature=t, mask=mask)
    message = f"temperature holds {wrong}; it must be positive and finite"
    with pytest.raises(ValueError, match=message):
        reference.token_logprobs(x, tokens, temperature=t.roll(1))
    with pytest.raises(ValueError, match=message):
        reference.token_logprobs(x, tokens, temperature=torch.tensor(wrong))
    for options in {"mask": mask, "temperature": t.roll(1)}, {"temperature": t}:
        with pytest.raises(ValueError, match=message):
            reference.exact_kl(x, y, **options)
