"""A pruned network outside PyTorch: the export that the README shows, run by ONNX Runtime."""

from __future__ import annotations

import onnxruntime
import torch

from chanaxes_pl.pruning.pruner import prune
from chanaxes_pl.pruning.slim_file import load_slim
from tests.helpers.networks import build

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_pruned_network_gives_the_same_logits_in_onnx_runtime(tmp_path):
    prune(build("resnet18"), [IMAGES], budget=0.5, round_to=8).save(tmp_path / "half")
    slim = load_slim(tmp_path / "half")
    path = tmp_path / "half.onnx"
    torch.onnx.export(slim, (IMAGES[:2],), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for size in (1, 2, 24):  # any batch, not only that of the export
        found = torch.from_numpy(session.run(None, {given.name: IMAGES[:size].numpy()})[0])
        with torch.no_grad():
            wanted = slim(IMAGES[:size])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
