"""Name of the processor."""

from pathlib import Path

import pytest

from advmoe_deploy.profiling.processor import processor_name

CPU = "processor\t: {0}\nmodel name\t: Some(R) Processor\nflags\t\t: fpu avx2 {1}\n\n"


@pytest.mark.parametrize(
    ("flags", "name"),
    [("avx512_bf16", "Some(R) Processor"), ("amx_bf16 amx_tile", "Some(R) Processor, AMX")],
)
def test_amx_is_named_with_the_model(
    flags: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(CPU.format(number, flags) for number in range(2))
    monkeypatch.setattr(Path, "read_text", lambda *args, **options: text)
    assert processor_name() == name
