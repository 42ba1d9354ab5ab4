"""The program that compute-sanitizer watches launches every kernel that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import every_kernel, kernels
from fastldm.ops import _extension, _triton


def test_names_of_kernels() -> None:
    found = kernels.all_kernels()
    assert {"_group_norm_silu_fwd_kernel", "_cross_attention_fwd_kernel"} <= found
    assert {"screen_narrow_kernel", "centre_kernel", "sum_by_code_kernel"} <= found
    # Every kernel of the CUDA sources, however it is declared.
    text = "".join(
        path.read_text(encoding="utf-8") for path in (kernels.ROOT / "csrc").rglob("*.cu")
    )
    assert text.count("__global__") == len(kernels.cuda_kernels())


@pytest.mark.skipif(not _triton.interprets(), reason="launches are seen in Triton's interpreter")
def test_every_triton_kernel_is_launched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton.runtime import interpreter

    launched: set[str] = set()
    run = interpreter.GridExecutor.__call__

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", note)
    operators = ["group_norm_silu", "cross_attention", "diffusion_step", "geglu"]
    assert every_kernel.main(["--device", "cpu", *operators]) == 0
    assert launched == kernels.triton_kernels()
    assert every_kernel.DONE in capsys.readouterr().out


@pytest.mark.skipif(_extension.problem() is not None, reason="needs the extension")
def test_the_lookup_is_called_at_every_depth() -> None:
    assert every_kernel.main(["--device", "cpu", "vector_quantize"]) == 0
    depths = {depth for depth, _ in every_kernel._CODEBOOKS}
    source = Path(kernels.ROOT, "csrc/include/fastldm/code_lookup_device.h").read_text()
    assert "constexpr int kMaxNarrow = 8;" in source
    assert set(range(1, 9)) < depths
