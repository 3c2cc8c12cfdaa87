"""Language models from human feedback. The ops are here by name: `from tetrad import gae`."""

import importlib

__version__ = "0.1.0"

_HOME = {  # op -> the module of tetrad.kernels that holds it, imported when the op is first used
    "token_logprobs": "logprob",
    "linear_token_logprobs": "linear_logprob",
    "linear_cross_entropy": "linear_loss",
    "linear_policy_loss": "linear_loss",
    "token_kl": "kl",
    "exact_kl": "exact_kl",
    "linear_exact_kl": "exact_kl",
    "gae": "advantages",
    "whiten": "advantages",
    "ppo_advantages": "advantages",
    "policy_loss": "ppo_loss",
    "value_loss": "ppo_loss",
    "ranking_loss": "ranking",
}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"tetrad.kernels.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tetrad' has no attribute {name!r}")
