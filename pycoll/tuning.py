"""One table of sizes and switch points. Every rank brings its values; a communicator uses the minimum over its ranks.

The figures were found with `pycoll bench all-reduce`; `auto` looks only at what all ranks share: world size and bytes.
"""

from dataclasses import dataclass

from pycoll import _C
from pycoll.errors import UsageError

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Config:
    """How much memory a communicator takes and where it switches algorithms. The defaults suit most uses.

    Attributes:
        channels: threads a rank uses for large tensors; 0: its share of the cores, at most 4.
        slot_bytes: one staging slot; each channel has two.
        link_bytes: one buffer of a ring or tree connection; each channel has 3 x `link_slots`.
        link_slots: buffers a connection has, at least 2.
        heap_bytes: address space for `Communicator.empty()`; memory is taken only as tensors are made. None: as large
            as the machine's memory, at most 64 GiB.
        one_shot_max_bytes: `auto` takes one-shot up to this size and two-shot above. None: by world size.
        channel_min_bytes: one channel more for each so many bytes of the tensor.
        word_bytes: GPUs only: what a channel sends each peer at once by the low-latency algorithms; 0: they are off.
        one_shot_ll_max_bytes: GPUs only: `auto` takes one_shot_ll up to this size,
        two_shot_ll_max_bytes: and two_shot_ll up to this one.
    """

    channels: int = 0
    slot_bytes: int = 512 * KiB
    link_bytes: int = 128 * KiB
    link_slots: int = 4
    heap_bytes: int | None = None
    one_shot_max_bytes: int | None = None
    channel_min_bytes: int = 512 * KiB
    word_bytes: int = 0
    one_shot_ll_max_bytes: int = 0
    two_shot_ll_max_bytes: int = 0


# World size up to -> largest tensor that one-shot takes (bytes). Each rank reads all slots, so the more ranks, the
# sooner two-shot wins.
ONE_SHOT_MAX_BYTES = {4: 32 * KiB, 8: 16 * KiB}


def one_shot_max_bytes(world_size: int) -> int:
    """Where `auto` switches from one-shot to two-shot, in bytes."""
    fitting = [limit for ranks, limit in ONE_SHOT_MAX_BYTES.items() if world_size <= ranks]
    return fitting[0] if fitting else 8 * KiB


def bucket_bytes(gradient_bytes: int) -> int:
    """The size of a bucket where fp32 gradients have so many bytes in all: an eighth of them, 4 to 32 MiB.

    Where a model is small, what has just been packed is still in the caches when it is averaged. Where it is large,
    nothing is, and each call costs a meeting of the ranks (32 Mi parameters: 56 ms a step in buckets of 32 MiB, 65 ms
    in those of 4); but what the last bucket takes no backward pass hides.
    """
    return min(max(gradient_bytes // 8, 4 * MiB), 32 * MiB)


# A GPU's channels are blocks: many, each with little. Words save the barriers, and cost twice the traffic. The heap is
# address space, of which GPUs have much. Not measured on GPUs yet.
CUDA = Config(
    slot_bytes=128 * KiB,
    link_bytes=16 * KiB,
    heap_bytes=256 * GiB,
    one_shot_max_bytes=0,
    channel_min_bytes=16 * KiB,
    word_bytes=8 * KiB,
    one_shot_ll_max_bytes=32 * KiB,
    two_shot_ll_max_bytes=256 * KiB,
)


def native_config(config: Config, world_size: int) -> _C.Config:
    """`config` with everything decided, for the extension."""
    native = _C.Config()
    heap = config.heap_bytes
    if heap is None:
        heap = min(_C.physical_memory(), 64 * GiB, 1024 * GiB // world_size)
    one_shot = config.one_shot_max_bytes
    if one_shot is None:
        one_shot = one_shot_max_bytes(world_size)
    native.channels = _checked("channels", config.channels, 0, 64)
    native.slot_bytes = _checked("slot_bytes", config.slot_bytes, 64, GiB)
    native.link_bytes = _checked("link_bytes", config.link_bytes, 64, GiB)
    native.link_slots = _checked("link_slots", config.link_slots, 2, 64)
    native.heap_bytes = _checked("heap_bytes", heap, 0, 1 << 46)
    native.one_shot_max_bytes = _checked("one_shot_max_bytes", one_shot, 0, 1 << 46)
    native.channel_min_bytes = _checked("channel_min_bytes", config.channel_min_bytes, 1, 1 << 46)
    native.word_bytes = _checked("word_bytes", config.word_bytes, 0, GiB)
    native.one_shot_ll_max_bytes = _checked("one_shot_ll_max_bytes", config.one_shot_ll_max_bytes, 0, 1 << 46)
    native.two_shot_ll_max_bytes = _checked("two_shot_ll_max_bytes", config.two_shot_ll_max_bytes, 0, 1 << 46)
    return native


def _checked(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise UsageError(f"pycoll: Config.{name} must be between {low} and {high}, not {value}")
    return value
