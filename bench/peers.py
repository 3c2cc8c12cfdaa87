"""The same ops by other packages, called as their users call them; those that are here.

    providers("token_logprobs")  # {"liger": function of (logits, tokens), ...}
    absent(["token_logprobs"])   # {"quack": "No module named 'quack'", ...}

Nothing is imported before it is asked for, and a package that fails at it, in whatever way, is
absent. Around the peer's function an adaptor adds a sign, a view, or what its caller would make
for it. Results come in the order of our op; gradients as the peer makes them, some in place of the
inputs. Where a mask hides something, it must be finite: most peers multiply by the mask.

    linear_policy_loss, policy_loss, value_loss   clip 0.2, mean over tokens
    gae, gae_whitened, ppo_advantages             gamma 1, lambda 0.95; valid tokens come first in a
                                                  row; KL coefficient 0.02, advantages and returns
    ranking_loss                                  pairs, the better first; its ranks are not read
"""

import functools
import sys
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGES = {  # provider: distribution
    "liger": "liger-kernel", "cut-cross-entropy": "cut-cross-entropy", "flash-attn": "flash-attn",
    "fla": "fla-core", "quack": "quack-kernels", "trl": "trl", "verl": "verl",
    "openrlhf": "openrlhf", "torchrl": "torchrl",
}  # fmt: skip
ADAPTORS: dict[str, dict[str, Callable[[], Callable]]] = {}  # op -> provider -> its import


def absent(ops: Iterable[str]) -> dict[str, str]:
    """Why a provider of these ops is not here, or which of its functions."""
    reasons: dict[str, dict[str, None]] = {}
    for op in ops:
        for provider in ADAPTORS.get(op, {}):
            found = _imported(op, provider)
            if isinstance(found, Exception):
                reason = f"{str(found) or type(found).__name__}".splitlines()[0][:200]
                reasons.setdefault(provider.split(",")[0], {})[reason] = None
    return {peer: _version(peer) + "; ".join(reasons[peer]) for peer in PACKAGES if peer in reasons}


def providers(op: str) -> dict[str, Callable]:
    """The peers that have this op, each a function of its inputs. One package may have it twice:
    what follows a comma in the name says which."""
    found = {provider: _imported(op, provider) for provider in ADAPTORS.get(op, {})}
    return {provider: call for provider, call in found.items() if not isinstance(call, Exception)}


@functools.cache
def _imported(op: str, provider: str) -> Callable | Exception:
    try:
        return ADAPTORS[op][provider]()
    except Exception as problem:  # a package may fail to import in any way; it breaks no benchmark
        return problem


def _version(peer: str) -> str:
    try:
        return f"{metadata.version(PACKAGES[peer])}: "
    except metadata.PackageNotFoundError:
        return ""


def _adapts(op: str, provider: str, *sources: str) -> Callable[[Callable], Callable]:
    """Register an adaptor: it takes what is found at each source "module:name", then the inputs."""
    assert provider.split(",")[0] in PACKAGES, f"{provider} has no distribution in PACKAGES"

    def register(adaptor: Callable) -> Callable:
        def importing() -> Callable:
            found = [_find(*source.split(":")) for source in sources]
            return functools.partial(_called, functools.partial(adaptor, *found))

        ADAPTORS.setdefault(op, {})[provider] = importing
        return adaptor

    return register


def _called(adaptor: Callable, *inputs: Tensor) -> Any:
    """Where no gradient is made, the inputs want none, as a model's outputs then: some peers look
    at the inputs alone, and would work for a gradient."""
    if not torch.is_grad_enabled():
        inputs = tuple(x.detach() for x in inputs)
    return adaptor(*inputs)


def _find(module: str, path: str) -> Any:
    home = import_module(module)
    try:
        return functools.reduce(getattr, path.split("."), home)
    except AttributeError:
        raise AttributeError(f"no function {path} at {module}") from None


@functools.cache
def _made(kind: Callable, **options: Any) -> Any:
    """kind(**options), once: a module or a configuration that users keep."""
    return kind(**options)


# Log-probs from logits.


@_adapts("token_logprobs", "liger", "liger_kernel.transformers.functional:liger_cross_entropy")
def _liger_logprobs(cross_entropy, logits, tokens):
    """Overwrites the logits with their gradient."""
    return -cross_entropy(logits, tokens, reduction="none")


@_adapts("token_logprobs", "flash-attn", "flash_attn.ops.triton.cross_entropy:cross_entropy_loss")
@_adapts("token_logprobs", "fla", "fla.modules.fused_cross_entropy:cross_entropy_loss")
def _flash_logprobs(cross_entropy, logits, tokens):
    return -cross_entropy(logits, tokens)[0]


@_adapts("token_logprobs", "quack", "quack.cross_entropy:cross_entropy")
def _quack_logprobs(cross_entropy, logits, tokens):
    return -cross_entropy(logits, tokens, reduction="none")


# Without a kernel for the case, these three loop over the first dimension: one row of all tokens.


@_adapts("token_logprobs", "trl", "trl.trainer.utils:selective_log_softmax")
@_adapts("token_logprobs", "verl", "verl.utils.torch_functional:logprobs_from_logits")
@_adapts("token_logprobs", "openrlhf", "openrlhf.models.utils:log_probs_from_logits")
def _logprobs_of_rows(logprobs_of, logits, tokens):
    """verl takes flash-attn's kernel where that is installed, and lets it overwrite the logits."""
    return logprobs_of(logits[None], tokens[None])[0]


@_adapts("token_logprobs_entropy", "trl", "trl.trainer.utils:selective_log_softmax_and_entropy")
def _trl_logprobs_entropy(both_of, logits, tokens):
    logprobs, entropy = both_of(logits[None], tokens[None])
    return logprobs[0], entropy[0]


@_adapts(
    "token_logprobs_entropy", "verl", "verl.utils.torch_functional:logprobs_from_logits",
    "verl.utils.torch_functional:entropy_from_logits",
)  # fmt: skip
def _verl_logprobs_entropy(logprobs_of, entropy_of, logits, tokens):
    """As its engines do: the entropy is compiled, and needs the logits, which stay."""
    logprobs = logprobs_of(logits[None], tokens[None], inplace_backward=False)[0]
    return logprobs, _made(torch.compile, model=entropy_of, dynamic=True)(logits)


@_adapts(
    "token_logprobs_entropy", "openrlhf", "openrlhf.models.utils:log_probs_from_logits",
    "openrlhf.models.utils:compute_entropy",
)  # fmt: skip
def _openrlhf_logprobs_entropy(logprobs_of, entropy_of, logits, tokens):
    return logprobs_of(logits[None], tokens[None])[0], entropy_of(logits)


# Log-probs and losses from hidden states.


@_adapts(
    "linear_token_logprobs", "liger",
    "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
)  # fmt: skip
def _liger_linear_logprobs(cross_entropy, hidden, weight, tokens):
    return -cross_entropy(hidden, weight, tokens, reduction="none")


@_adapts(
    "linear_token_logprobs", "liger, scaled",
    "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction",
)  # fmt: skip
def _liger_scaled_logprobs(function, hidden, weight, tokens):
    """Its op for RL: CuTe DSL on Hopper, where it needs that installed; in PyTorch elsewhere."""
    return -function.apply(hidden, weight, tokens)


@_adapts(
    "linear_token_logprobs", "cut-cross-entropy", "cut_cross_entropy:linear_cross_entropy"
)  # fmt: skip
def _cce_linear_logprobs(cross_entropy, hidden, weight, tokens):
    """It skips what is small in the gradient, and sums it in bf16: in that of the hidden states
    a large vocabulary leaves an error of some percent."""
    return -cross_entropy(hidden, weight, tokens, reduction="none")


@_adapts(
    "linear_token_logprobs", "quack", "quack.linear_cross_entropy:linear_cross_entropy_func"
)  # fmt: skip
def _quack_linear_logprobs(cross_entropy, hidden, weight, tokens):
    return -cross_entropy(hidden, weight, None, tokens, reduction="none")


@_adapts("linear_token_logprobs", "trl", "trl.kernels:ChunkedLogProbFunction")
def _trl_linear_logprobs(function, hidden, weight, tokens):
    chunk = 1 << 15  # columns; so its trainers
    return function.apply(hidden, weight, None, tokens, 1.0, chunk, None, 1.0, ("log_probs",))[0]


@_adapts(
    "linear_token_logprobs", "verl", "verl.utils.experimental.torch_functional:FusedLinearForPPO"
)
def _verl_linear_logprobs(Fused, hidden, weight, tokens):
    return _made(Fused)(hidden, weight, tokens)[0]


@_adapts(
    "linear_token_logprobs", "verl, triton",
    "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
)  # fmt: skip
def _verl_triton_logprobs(cross_entropy, hidden, weight, tokens):
    return cross_entropy(hidden, weight, tokens, 1.0, "none")[0]


@_adapts(
    "linear_cross_entropy", "liger",
    "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
)  # fmt: skip
@_adapts("linear_cross_entropy", "cut-cross-entropy", "cut_cross_entropy:linear_cross_entropy")
@_adapts(
    "linear_cross_entropy", "quack", "quack.linear_cross_entropy:chunked_linear_cross_entropy"
)  # fmt: skip
def _linear_cross_entropy(cross_entropy, hidden, weight, tokens):
    return cross_entropy(hidden, weight, tokens)


@_adapts(
    "linear_cross_entropy", "fla",
    "fla.modules.fused_linear_cross_entropy:fused_linear_cross_entropy_loss",
)  # fmt: skip
def _fla_linear_cross_entropy(cross_entropy, hidden, weight, tokens):
    return cross_entropy(hidden, tokens, weight)


@_adapts("linear_policy_loss", "liger", "liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
def _liger_linear_policy_loss(Loss, hidden, weight, tokens, old_logprobs, advantages, mask):
    """GRPO's loss without its KL term is PPO's. It has an advantage for each sequence: every token
    is one here, and all are one chunk, as a chunk is of whole sequences."""
    loss = _made(Loss, beta=0.0, use_ref_model=False, loss_type="dapo", chunk_size=sys.maxsize)
    columns = (x[:, None] for x in (hidden, tokens, mask, old_logprobs))
    hidden, tokens, mask, old_logprobs = columns
    return loss(hidden, weight, tokens, mask, advantages, old_per_token_logps=old_logprobs)[0]


# Divergences.


@_adapts("token_kl", "verl", "verl.trainer.ppo.core_algos:kl_penalty")
def _verl_token_kl(kl_of, logprobs, ref_logprobs):
    return kl_of(logprobs, ref_logprobs, "k3")


@_adapts("token_kl", "openrlhf", "openrlhf.models.utils:compute_approx_kl")
def _openrlhf_token_kl(kl_of, logprobs, ref_logprobs):
    return kl_of(logprobs, ref_logprobs, kl_estimator="k3")


@_adapts(
    "exact_kl", "trl", "trl.experimental.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss"
)  # fmt: skip
def _trl_exact_kl(divergence, logits, ref_logits):
    """Of fp32 logits, which accelerate makes of bf16 ones; in bf16 it errs by 3 %."""
    return divergence(logits.float(), ref_logits.float(), beta=1, reduction="none").sum(-1)


@_adapts("linear_exact_kl", "trl", "trl.kernels.chunked_divergence:ChunkedDivergenceFunction")
def _trl_linear_exact_kl(function, hidden, weight, ref_hidden, ref_weight):
    return function.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]


# Advantages.


@_adapts(
    "gae", "openrlhf",
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns",
)  # fmt: skip
def _openrlhf_gae(estimate, rewards, values, mask):
    return estimate(None, values, rewards, mask, 1.0, 0.95)


@_adapts(
    "gae", "torchrl", "torchrl.objectives.value.functional:vec_generalized_advantage_estimate"
)  # fmt: skip
def _torchrl_gae(estimate, rewards, values, mask):
    """It is a convolution, which cuDNN would do in TF32."""
    last = mask ^ F.pad(mask[:, 1:], (0, 1))
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return estimate(1.0, 0.95, values, values.roll(-1, 1), rewards, last, time_dim=-1)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@_adapts("gae_whitened", "verl", "verl.trainer.ppo.core_algos:compute_gae_advantage_return")
def _verl_gae_whitened(estimate, rewards, values, mask):
    """Its variance is unbiased."""
    return estimate(rewards, values, mask.long(), 1.0, 0.95)


@_adapts(
    "ppo_advantages", "verl", "verl.trainer.ppo.core_algos:compute_rewards",
    "verl.trainer.ppo.core_algos:compute_gae_advantage_return",
)  # fmt: skip
def _verl_ppo_advantages(
    rewards_of, estimate, scores, logprobs, ref_logprobs, values, mask
):  # fmt: skip
    """Its reward manager hands over the score in the place of the last token."""
    mask = mask.long()
    at_end = torch.zeros_like(logprobs).scatter_(1, mask.sum(1, True) - 1, scores[:, None])
    rewards = rewards_of(at_end, logprobs, ref_logprobs, 0.02)
    return estimate(rewards, values, mask, 1.0, 0.95)


OPENRLHF = SimpleNamespace(
    algo=SimpleNamespace(
        advantage=SimpleNamespace(estimator="gae", gamma=1.0, lambd=0.95, no_std_norm=False)
    ),
    rollout=SimpleNamespace(n_samples_per_prompt=1),
    reward=SimpleNamespace(clip_range=None),
)


@_adapts(
    "ppo_advantages", "openrlhf",
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker",
    "openrlhf.trainer.ppo_utils.experience:Experience", "openrlhf.models.utils:compute_approx_kl",
)  # fmt: skip
def _openrlhf_ppo_advantages(
    Maker, Experience, kl_of, scores, logprobs, ref_logprobs, values, mask
):
    maker = Maker.__new__(Maker)  # without the workers that its __init__ asks for
    maker.advantage_estimator, maker.kl_ctl = "gae", SimpleNamespace(value=0.02)
    maker.strategy = SimpleNamespace(args=OPENRLHF)
    experience = Experience(
        index=list(range(len(scores))), rewards=scores, kl=kl_of(logprobs, ref_logprobs),
        values=values, action_mask=mask, info={},
    )  # fmt: skip
    maker.compute_advantages_and_returns([experience])
    return experience.advantages, experience.returns


# Losses.


@_adapts(
    "policy_loss", "verl", "verl.trainer.ppo.core_algos:compute_policy_loss_vanilla",
    "verl.workers.config:ActorConfig",
)  # fmt: skip
def _verl_policy_loss(loss_of, Config, logprobs, old_logprobs, advantages, mask):
    config = _made(
        Config, strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio_c=1e9,  # its dual clip: out of reach
    )  # fmt: skip
    return loss_of(old_logprobs, logprobs, advantages, mask, config=config)[0]


@_adapts("policy_loss", "openrlhf", "openrlhf.models.loss:PolicyLoss")
def _openrlhf_policy_loss(Loss, logprobs, old_logprobs, advantages, mask):
    return _made(Loss)(logprobs, old_logprobs, advantages, mask)[0]


@_adapts("value_loss", "verl", "verl.trainer.ppo.core_algos:compute_value_loss")
def _verl_value_loss(loss_of, values, old_values, returns, mask):
    return loss_of(values, returns, old_values, mask, 0.2)[0]


@_adapts("value_loss", "openrlhf", "openrlhf.models.loss:ValueLoss")
def _openrlhf_value_loss(Loss, values, old_values, returns, mask):
    return _made(Loss, clip_eps=0.2)(values, old_values, returns, mask)


@_adapts("ranking_loss", "openrlhf", "openrlhf.models.loss:PairWiseLoss")
def _openrlhf_ranking_loss(Loss, scores, ranks, cu_prompts):
    return _made(Loss)(scores[0::2], scores[1::2])
