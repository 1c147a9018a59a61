"""`--format 2:4` on a GPU: packed layers give the masked network's outputs."""

from pathlib import Path

import pytest
import torch

from bip.__main__ import main
from bip.exporting.formats.semi_structured import load_semi_structured
from bip.exporting.model import read_model
from tests.runs import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.timeout(300)
def test_packed_equals_masked(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("omp", tmp_path, source_net=source, layer_type="2:4", max_steps=2)
    out = tmp_path / "a.pt"
    assert main(["export", str(run.best), str(out), "--format", "2:4"]) == 0
    assert "layers have sizes that torch packs" in capsys.readouterr().out
    model = read_model(run.best)
    images = model.sample(8)
    packed = load_semi_structured(out)(images.half().cuda()).float().cpu()
    torch.testing.assert_close(packed, model.network(images), rtol=2e-2, atol=2e-2)
