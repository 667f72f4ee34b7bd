"""The Python equivalents of the commands.

    with ckptkit.open("model.pth") as ckpt:
        clean = ckpt.rewrite(ckptkit.StripModule(), ckptkit.MapLocation("cpu"))
        clean.save("model.safetensors")

    state = ckptkit.load_state_dict("anything.pth", map_location="cpu")
    ckptkit.save(state, "out.safetensors")
    ckptkit.convert("ddp.pth", "clean.safetensors", strip_module=True)
    ckptkit.verify("clean.safetensors", model="torchvision:resnet18").raise_if_failed()

Only `load`, `load_state_dict` and `verify` import torch.

Every function may be called from several threads at once.  None of them is a coroutine, and reading and writing release
the GIL: ``await asyncio.to_thread(ckptkit.load_state_dict, path)`` keeps an event loop responsive.
"""

from ckptkit.api.gate import check, manifest
from ckptkit.api.weights import convert, diff, inspect, load, load_state_dict, verify
from ckptkit.checkpoint_file import CheckpointFile, PathLike, Rewriter, open, save  # noqa: A004 - the name users expect

__all__ = [
    "CheckpointFile", "PathLike", "Rewriter",
    "check", "convert", "diff", "inspect", "load", "load_state_dict", "manifest", "open", "save", "verify",
]  # fmt: skip
