"""What is evaluated: one VLM pruned in one way, and how it is made ready."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.evaluation.benchmarks import NATIVE, Protocol, checked
from ocvtp.evaluation.generate import Answerer, PreparedMemory

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvaluationSetting:
    """One way to run one VLM.

    Attributes:
        vlm: name in the catalogue, or a folder.
        method: as `ocvtp methods` lists; "vanilla" prunes nothing.
        keep: tokens an image, a share in (0, 1], or a percentage; None for vanilla.
        seed: of methods with randomness; None for 0.
        pruner: folder of a trained pruner, for the methods that need one.
        options: of the method.
        dtype: of the weights and of the computation.
        batch_size: questions at once; answers do not depend on it, up to rounding.
        max_new_tokens: of a question whose benchmark does not say.
        protocol: native: as the VLM's chat template and lmms-eval have it; paper: as the authors asked, see
            benchmarks.yaml and `ocvtp.vlms.conversations`.
    """

    vlm: str = "tiny-llava"
    method: str = "vanilla"
    keep: int | float | str | None = None
    seed: int | None = None
    pruner: Path | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    batch_size: int = 32
    max_new_tokens: int = 16
    protocol: Protocol = NATIVE

    def __post_init__(self) -> None:
        checked(self.protocol)
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype {self.dtype!r}: one of {', '.join(DTYPES)}")
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise BadInput(f"batch_size {self.batch_size} and max_new_tokens {self.max_new_tokens}: at least 1 each")
        if self.method == "vanilla" and (self.keep is not None or self.pruner is not None or self.options):
            raise BadInput("vanilla keeps all tokens: it takes no keep, no pruner and no options")
        if self.method != "vanilla" and self.keep is None:
            raise BadInput(f"{self.method} needs keep: tokens an image, a share in (0, 1], or a percentage")


@contextmanager
def ready(setting: EvaluationSetting, device: str = "cpu", *, shared: bool = True) -> Iterator[Answerer]:
    """The VLM of a setting, pruned as it says within the `with`.

    Args:
        setting: which VLM, and how it is pruned.
        device: cpu, cuda, ...
        shared: use the VLM that is loaded in this process, and keep it loaded: a worker loads it once for many settings
            and benchmarks. The one used last is kept.

    Raises:
        BadInput, Incompatible, NotAvailable: as `ocvtp.vlms.loading.load` and `ocvtp.prune` do.
    """
    from ocvtp.pruning import prune

    vlm, memory, prepared = (_load if shared else _load.__wrapped__)(setting.vlm, setting.dtype, device)
    if setting.keep is None:  # vanilla
        yield Answerer(vlm, None, setting.max_new_tokens, prepared, setting.protocol)
        return
    handle = prune(
        vlm.model,
        method=setting.method,
        keep=setting.keep,
        pruner=setting.pruner,
        seed=setting.seed or 0,
        **setting.options,
    )
    handle.share(memory)
    with handle:
        yield Answerer(vlm, handle, setting.max_new_tokens, prepared, setting.protocol)


@lru_cache(maxsize=1)
def _load(vlm: str, dtype: str, device: str) -> tuple[Any, Any, PreparedMemory]:
    """The VLM, and memories of what its tower saw and of what it was asked."""
    import torch

    from ocvtp.vlms.loading import load
    from ocvtp.vlms.memory import VisionMemory

    return load(vlm, device=device, dtype=getattr(torch, dtype)), VisionMemory(), PreparedMemory()


def forget() -> None:
    """Let go of the VLM that is kept loaded."""
    _load.cache_clear()


def pruner_fingerprint(folder: Path | str | None) -> str | None:
    """A digest of a trained pruner's configuration and weights; None without a pruner.

    Raises:
        BadInput: the folder is not one that `OCPruner.save_pretrained` wrote.
    """
    if folder is None:
        return None
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        path = Path(folder) / name
        if not path.is_file():
            raise BadInput(f"{folder} is no trained pruner: it has no {name}")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
