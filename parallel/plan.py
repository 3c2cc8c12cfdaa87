"""Bytes of every role on every rank before anything is allocated: arithmetic on shapes and layouts.

Parameters, gradients and optimizer are exact: the flat buffers of Megatron's DDP and the shards of
its distributed optimizer, padding included. Activations and workspaces are what autograd keeps for
the layers of model.py; docs/plan.md derives them. Needs neither torch nor a GPU.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from tetrad.parallel.settings import ALIGNMENT, BYTES, Architecture, Layout

LOSS_ROWS = 4096  # kernels.linear_loss.ROWS, which needs torch to be read
CHUNK_BYTES = 2**30  # kernels.linear_logprob.CHUNK_BYTES
Bytes = dict[str, int]  # by kind


@dataclass(frozen=True)
class Role:
    """One of the models of a run, and how it is spread."""

    architecture: Architecture
    head: str  # "language" or "scalar"
    layout: Layout
    precision: str = "bf16"
    trained: bool = False  # has gradients and an optimizer; otherwise parameters only
    ema: bool = False  # keeps an exponential moving average of its weights
    recompute: bool = False
    overlap: bool = False  # of gradient reduction with the backward pass: smaller buckets

    def stage(self, world: int, rank: int) -> int:
        """Pipeline stage of a rank."""
        return rank // (world // self.layout.pp)

    def shards(self, world: int) -> int:
        """Ranks over which the optimizer is divided: dp x cp."""
        return self.layout.dp(world) * self.layout.cp

    def layers(self) -> int:
        """Of one chunk of one stage."""
        return self.architecture.num_layers // (self.layout.pp * self.layout.vpp)


@lru_cache
def parameters(role: Role, stage: int, chunk: int = 0) -> tuple[tuple[int, bool], ...]:
    """Elements of each parameter of one chunk of a stage, in Megatron's order; and whether it is
    the tied embedding of two different stages, which gets a bucket of its own."""
    a, layout = role.architecture, role.layout
    h, tp, biased = a.hidden_size, layout.tp, not a.gated
    q, kv, ffn = a.num_heads * a.channels // tp, a.kv_heads * a.channels // tp, a.ffn // tp
    qkv, fc1 = q + 2 * kv, (1 + a.gated) * ffn
    vocabulary = a.padded_vocab(tp) // tp * h
    norm = [h, h] if biased else [h]
    before, after = ([], norm) if a.family == "gpt1" else (norm, [])
    layer = [
        *before, q * h, *[h] * biased, qkv * h, *[qkv] * (biased or a.family == "qwen2"),
        *[a.channels] * (2 * (a.family == "qwen3")), *after,
        *before, fc1 * h, *[fc1] * biased, ffn * h, *[h] * biased, *after,
    ]  # fmt: skip
    first = stage == 0 and chunk == 0
    last = stage == layout.pp - 1 and chunk == layout.vpp - 1
    tied = role.head == "language" and a.tie_embeddings
    sizes = [(vocabulary, tied and not last)] if first else []
    if first and biased:
        sizes.append((a.max_length * h, False))
    sizes += [(n, False) for n in layer * role.layers()]
    if last:
        sizes += [(n, False) for n in ([] if a.family == "gpt1" else norm)]
        if role.head == "scalar":
            sizes += [(h, False), (1, False)]
        elif not (tied and first):  # a tied last stage has a copy of its own
            sizes.append((vocabulary, tied))
    return tuple(sizes)


def elements(role: Role, stage: int) -> int:
    """Parameters of one stage on one rank."""
    return sum(n for c in range(role.layout.vpp) for n, _ in parameters(role, stage, c))


@lru_cache
def buffer_size(
    parameters: tuple[tuple[int, bool], ...], shards: int, bucket_size: int | None
) -> int:
    """Elements of Megatron's flat buffer: parameters from last to first, each from a multiple of
    64, in buckets that end at multiples of lcm(shards, 128), closed at `bucket_size` elements
    (None: one bucket) and around a tied embedding."""
    multiple = math.lcm(shards, 128)
    begin = end = 0  # of the bucket; of what is placed
    for size, alone in reversed(parameters):
        end = -(-end // 64) * 64
        if alone:
            begin = end = -(-end // multiple) * multiple
        end += size
        if alone or (bucket_size is not None and end - begin >= bucket_size):
            begin = end = -(-end // multiple) * multiple
    return -(-end // multiple) * multiple


def state(role: Role, world: int, rank: int) -> Bytes:
    """Bytes that one rank holds for a role, whatever it works on: parameters, gradients,
    optimizer, ema. Exact, but for the step counters of Adam (4 bytes a parameter tensor)."""
    stage, element = role.stage(world, rank), BYTES[role.precision]
    if not role.trained:
        chunks = (parameters(role, stage, chunk) for chunk in range(role.layout.vpp))
        size = sum(-(-n // ALIGNMENT) * ALIGNMENT for chunk in chunks for n, _ in chunk)
        return {"parameters": element * size}
    shards, size = role.shards(world), 0
    for chunk in range(role.layout.vpp):
        bucket_size = None
        if role.overlap and stage == 0 and chunk == 0:  # Megatron's rule: nobody waits for others
            bucket_size = max(40_000_000, 1_000_000 * role.layout.dp(world))
        size += buffer_size(parameters(role, stage, chunk), shards, bucket_size)
    held = {"parameters": element * size, "gradients": 4 * size}
    # exp_avg and exp_avg_sq; in bf16 the main weights too, in fp32 these are the parameters
    held["optimizer"] = (8 if role.precision == "fp32" else 12) * size // shards
    return held | ({"ema": 4 * size // shards} if role.ema else {})


@dataclass(frozen=True)
class Layer:
    """One layer on one rank: bytes a token, for the tokens that its context-parallel rank has."""

    saved: int  # kept by autograd from the forward to the backward pass
    input: int  # of which its input
    forward: int  # alive at once when nothing is kept
    backward: int  # gradients alive at once in the backward pass, beside what was saved


@lru_cache
def layer_of(role: Role, *, split: bool = True) -> Layer:
    """split: tokens are divided among tp ranks where weights are not, if the layout says so;
    sampling never does."""
    a, layout, e = role.architecture, role.layout, BYTES[role.precision]
    tp, cp = layout.tp, layout.cp
    whole = e * a.hidden_size
    parts = tp if layout.sequence_parallel and split else 1
    hidden = whole // parts
    q, kv = (e * n * a.channels // tp for n in (a.num_heads, a.kv_heads))
    ffn = e * a.ffn // tp
    heads = a.num_heads // tp
    # heads of grouped queries lie between keys and values: to put them together is a copy
    copied = q * (a.num_heads > a.kv_heads > tp)
    # norm: input, output, fp32 mean and 1 / deviation, twice
    saved = 4 * hidden + 2 * (4 if a.gated else 8) // parts
    # attention: output and fp32 log-sum-exp; query, key and value
    saved += q + 4 * heads
    if cp > 1:  # keys and values of what its two runs of tokens see, from all ranks
        saved += q + (0 if a.gated else 2 * kv) + kv * (2 * cp + 1)
    elif a.gated:  # query and key turned by RoPE; the value is a view of the whole product
        saved += q + kv + (q + 2 * kv)
    else:  # views of the product
        saved += q + 2 * kv + copied
    if a.gated:  # RoPE: sine and cosine for query and key
        saved += 4 * e * a.channels
    if a.family == "qwen3":  # norms of the heads: input, and fp32 1 / deviation
        saved += copied + 4 * (heads + a.kv_heads // tp) + (q + 2 * kv) * (cp > 1)
    # SwiGLU: both halves, silu, the linear half + 0, the product; GELU: input and output
    saved += ffn * (5 if a.gated else 2)
    # the layer's input, the residual sum, the norm's output; and what follows it
    attention = 3 * hidden + 2 * (q + 2 * kv) + q
    if cp > 1 and split:  # keys and values gathered, and those of its runs
        attention += kv * (4 * cp + 1)
    forward = max(attention, 3 * hidden + ffn * (5 if a.gated else 2))
    backward = 2 * whole + ffn  # what was saved goes as gradients come
    return Layer(saved, hidden, forward, backward)


@dataclass(frozen=True)
class Work:
    """What one iteration of PPO asks of the models."""

    episodes: int
    minibatch: int  # episodes of one optimizer step
    epochs: int
    prompt: int  # tokens, the longest
    response: int  # tokens, the longest
    microbatch_tokens: int
    rows_at_once: int
    ptx: int = 0  # pretraining sequences of one optimizer step
    ptx_length: int = 0

    @property
    def longest(self) -> int:
        return self.prompt + self.response

    def parts(self, role: Role, world: int, episodes: int) -> tuple[int, int]:
        """Micro-batches of a replica's share of so many episodes, all as long as can be, and the
        tokens of the largest."""
        share = -(-episodes // role.layout.dp(world)) * self.longest
        tokens = min(max(self.microbatch_tokens, self.longest), share)
        count = -(-share // tokens)
        if role.layout.vpp > 1:
            count = -(-count // role.layout.pp) * role.layout.pp
        multiple = role.layout.token_multiple
        return count, -(-tokens // multiple) * multiple

    def rows(self, role: Role, world: int) -> int:
        """Responses that a rank samples at once."""
        return min(self.rows_at_once, -(-self.episodes // role.shards(world)))


@dataclass(frozen=True)
class Moment:
    """A time of an iteration at which one role works: what it needs beside what lies there."""

    phase: str
    role: str
    needs: Bytes

    @property
    def total(self) -> int:
        return sum(self.needs.values())


def slots(names: list[str], swap: bool) -> dict[str, list[list[str]]]:
    """By kind of memory, the groups of roles that take turns with one slot, given the roles in the
    order in which they are read."""
    apart, together = [[name] for name in names], [names]
    return {
        "parameters": [names[::2], names[1::2]] if swap else apart,
        "gradients": together,
        "optimizer": together if swap else apart,
    }


@dataclass(frozen=True)
class Run:
    """Four roles, their work, and the processes that do it."""

    roles: Mapping[str, Role]  # in the order in which they are read, the policy first
    work: Work
    world: int

    def states(self, rank: int) -> dict[str, Bytes]:
        """Bytes of each role on one rank by kind, each role as if alone."""
        return {name: state(role, self.world, rank) for name, role in self.roles.items()}

    def needs(self, rank: int) -> dict[str, Bytes]:
        """What `colocate` is to make room for: bytes of "parameters", "gradients" and "optimizer",
        which the moving average is a part of."""
        return {
            name: {
                "parameters": x["parameters"],
                "gradients": x.get("gradients", 0),
                "optimizer": x.get("optimizer", 0) + x.get("ema", 0),
            }
            for name, x in self.states(rank).items()
        }

    def held(self, rank: int, swap: bool) -> dict[str, Bytes]:
        """Bytes that lie on the GPU at all times, by owner and kind. The trained roles share one
        arena of gradients. With swap the roles share two slots of parameters, in turn, and one of
        optimizer state; what has no place there lies in pinned memory of the host."""
        needs = self.needs(rank)
        arena = {"gradients": max(x["gradients"] for x in needs.values())}
        trained = " | ".join(name for name, role in self.roles.items() if role.trained)
        if not swap:
            kinds = ("parameters", "optimizer", "ema")
            states = self.states(rank).items()
            held = {name: {k: x[k] for k in kinds if k in x} for name, x in states}
            return held | {trained: held.get(trained, {}) | arena}
        held = {
            " | ".join(slot): {"parameters": max(needs[name]["parameters"] for name in slot)}
            for slot in slots(list(needs), swap)["parameters"]
        }
        optimizer = {"optimizer": max(x["optimizer"] for x in needs.values())}
        return held | {trained: arena | optimizer}

    def pinned(self, rank: int) -> int:
        """Bytes of pinned host memory of one rank, when roles are swapped."""
        return sum(x["parameters"] + x["optimizer"] for x in self.needs(rank).values())

    def moments(self, rank: int, swap: bool) -> list[Moment]:
        """What each phase needs beside what is held, for each role that works in it."""
        w, policy = self.work, self.roles["policy"]
        needs = [*self._building(rank, swap)]
        needs.append(Moment("rollout", "policy", self._sampling(policy, rank)))
        for name, role in self.roles.items():
            needs.append(Moment("score", name, self._reading(role, rank)))
        for name, role in self.roles.items():
            if role.trained:
                ptx = w.ptx * w.ptx_length / w.longest if role is policy else 0
                needs.append(Moment("learn", name, self._training(role, rank, math.ceil(ptx))))
        batch = 40 * w.episodes * w.longest  # tokens, mask and the floats of a token, on all ranks
        return [Moment(m.phase, m.role, m.needs | {"batch": batch}) for m in needs]

    def always(self, rank: int, swap: bool) -> int:
        """Bytes that lie on the GPU at all times."""
        return sum(sum(x.values()) for x in self.held(rank, swap).values())

    def peak(self, rank: int, swap: bool) -> tuple[int, Moment]:
        """Bytes at the worst moment of one rank, and that moment."""
        worst = max(self.moments(rank, swap), key=lambda m: m.total)
        return self.always(rank, swap) + worst.total, worst

    def _building(self, rank: int, swap: bool) -> Iterator[Moment]:
        """Each role as it is built, the trained ones first: beside its place there are the module's
        weights and the buffers that Megatron makes, but what is built later is not there yet."""
        needs, always, names = self.needs(rank), self.always(rank, swap), list(self.roles)
        groups = slots(names, swap)

        def used(kind: str, built: list[str]) -> int:
            """Bytes of the slots, each as large as it will be, that some of these roles have."""
            made = (group for group in groups[kind] if not {*group}.isdisjoint(built))
            return sum(max(needs[name][kind] for name in group) for group in made)

        order = sorted(names, key=lambda name: not self.roles[name].trained)
        for i, name in enumerate(order):
            before, now = order[:i], order[: i + 1]
            copies = 2 if self.roles[name].trained else 1  # the module's; Megatron's buffer
            weights = used("parameters", now) + copies * needs[name]["parameters"]
            gradients = used("gradients", now) + needs[name]["gradients"]
            optimizer = used("optimizer", before)
            workspace = max(0, weights + gradients + optimizer - always)
            yield Moment("start", name, {"workspaces": workspace})

    def ranks(self) -> list[int]:
        """One rank of each kind: those of the same stages hold the same."""
        kinds: dict[tuple, int] = {}
        for rank in range(self.world):
            kinds.setdefault(tuple(r.stage(self.world, rank) for r in self.roles.values()), rank)
        return list(kinds.values())

    def worst(self, swap: bool) -> int:
        """The rank with the highest peak."""
        return max(self.ranks(), key=lambda rank: self.peak(rank, swap)[0])

    def _sampling(self, role: Role, rank: int) -> Bytes:
        a, w, layout, e = role.architecture, self.work, role.layout, BYTES[role.precision]
        stage = role.stage(self.world, rank)
        rows, tp = w.rows(role, self.world), layout.tp
        places = 2 * rows * w.longest * a.channels // tp  # of keys and values of one layer and head
        cache = places * e * a.kv_heads * role.layers() * layout.vpp
        # all prompts at once through a layer; a row that ends moves the others, layer by layer
        prefill = rows * w.prompt * layer_of(role, split=False).forward
        step = places * e * a.kv_heads
        draw = 0
        if stage == layout.pp - 1:  # fp32 logits, gathered; fp64: logits, their softmax, its sums
            vocabulary = a.padded_vocab(tp)
            draw = rows * (28 * vocabulary + (4 * vocabulary // tp if tp > 1 else 0))
        return {"activations": prefill, "KV cache": cache, "workspaces": max(step, draw)}

    def _reading(self, role: Role, rank: int) -> Bytes:
        a = role.architecture
        _, tokens = self.work.parts(role, self.world, self.work.episodes)
        local = tokens // role.layout.cp
        last = role.stage(self.world, rank) == role.layout.pp - 1
        answer = 4 if role.head == "scalar" else BYTES[role.precision]
        answers = local * a.hidden_size * answer * last
        sent = 0 if last else 2 * local * layer_of(role).input  # and received, between stages
        logits = 0
        if last and role.head == "language":
            logits = min(CHUNK_BYTES, 4 * local * a.padded_vocab(role.layout.tp) // role.layout.tp)
        workspace = self._gathered(role, local) + answers + sent + logits
        return {"activations": local * layer_of(role).forward, "workspaces": workspace}

    def _training(self, role: Role, rank: int, ptx: int) -> Bytes:
        a, w, layout, e = role.architecture, self.work, role.layout, BYTES[role.precision]
        stage = role.stage(self.world, rank)
        count, tokens = w.parts(role, self.world, max(w.minibatch, ptx))
        local, layer, layers = tokens // layout.cp, layer_of(role), role.layers()
        last = stage == layout.pp - 1
        kept = layers * (layer.input if role.recompute else layer.saved)
        # and what a stage hands on, or the input of the final norm
        activations = local * in_flight(layout, stage, count) * (kept + layer.input)
        if role.recompute:
            activations += local * (layer.saved - layer.input)
        matrix = max(n for c in range(layout.vpp) for n, _ in parameters(role, stage, c))
        workspace = local * layer.backward + e * matrix + self._gathered(role, local)
        if last and role.head == "scalar":
            workspace += 4 * local * a.hidden_size
        elif last:
            # kernels.linear_loss: logits and their gradient; the sum of that of hidden states, also
            # rounded, and a copy of the rows that are multiplied
            rows, width = min(LOSS_ROWS, local), a.padded_vocab(layout.tp) // layout.tp
            workspace += rows * width * (4 + e) + ((4 + e) * local + e * rows) * a.hidden_size
        return {"activations": activations, "workspaces": workspace}

    def _gathered(self, role: Role, local: int) -> int:
        """Bytes of Megatron's buffer for tokens gathered from the tp ranks."""
        split = role.layout.sequence_parallel and role.layout.tp > 1
        return local * role.architecture.hidden_size * BYTES[role.precision] * split


def in_flight(layout: Layout, stage: int, count: int) -> int:
    """Micro-batches, of one chunk each, whose activations a stage holds at once: Megatron's 1F1B,
    plain or interleaved."""
    if layout.vpp == 1:
        return min(layout.pp - stage, count)
    return min(2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1, count * layout.vpp)
