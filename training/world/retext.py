"""Let a trained UNet read another text encoder, without learning to read anew.

Cross-attention reads text rows through linear maps, so where the old encoder's rows are a linear function of the new
one's, composing each map with that function changes nothing. The function is fitted on captions.

python -m training.world.retext --old training/out/text_before.pt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.common import DEFAULT_OUT, load_checkpoint, save_atomically
from training.world import latents
from training.world.denoise import tokenize
from training.world.train_text import load_text

READERS = ("attn2.to_k.weight", "attn2.to_v.weight")
RIDGE = 1e-4
CAPTIONS = 2000


@torch.no_grad()
def rows_of(tokenizer: CLIPTokenizer, text: CLIPTextModel, captions: Sequence[str]) -> Tensor:
    """(captions * length, width) text rows."""
    ids = tokenize(tokenizer, captions)
    return torch.cat([text(part).last_hidden_state for part in ids.split(100)]).flatten(0, 1)


def fit(new: Tensor, old: Tensor) -> tuple[Tensor, float]:
    """The matrix that takes rows of `new` nearest to those of `old`, and the share of their square it leaves over."""
    new, old = new.double(), old.double()
    gram = new.T @ new
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram, new.T @ old)
    return change.float(), float((old - new @ change).square().sum() / old.square().sum())


def changed(weights: dict[str, Tensor], change: Tensor) -> dict[str, Tensor]:
    """Weights whose readers see new rows as they saw the old ones."""
    return {name: value @ change.T if name.endswith(READERS) else value for name, value in weights.items()}


def without_moments(momenta: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) if name.endswith(READERS) else value for name, value in momenta.items()}


def retext(out: Path, old: Path) -> float:
    """Rewrite `out/unet.pt`, trained with the encoder in `old`, for `out/text.pt`; returns what the fit leaves over."""
    saved = load_checkpoint(out / "unet.pt")
    if saved is None:
        raise FileNotFoundError(f"no {out / 'unet.pt'}: nothing to change")
    captions = [row[0] for row in latents.load(out, 128).captions[:CAPTIONS]]
    tokenizer, new_text = load_text(out)
    _, old_text = load_text(out, old)
    change, left = fit(rows_of(tokenizer, new_text, captions), rows_of(tokenizer, old_text, captions))
    for part in ("model", "average"):
        saved[part] = changed(saved[part], change)
    if "momenta" in saved:
        saved["momenta"] = without_moments(saved["momenta"])
    save_atomically(saved, out / "unet.pt")
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--old", type=Path, required=True, help="the text checkpoint that the UNet was trained with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"left over: {retext(options.out, options.old):.1%}")


if __name__ == "__main__":
    main()
