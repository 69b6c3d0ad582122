"""Every command finds out before its work that its results cannot be written."""

import pytest
from launching import TINY, forked

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    forked(*TINY, "--steps", 1, "--out", folder).succeeded()
    return folder


@pytest.mark.parametrize(
    ("command", "name"), [("sample", "x.png"), ("export", "x.pt"), ("export", "x.safetensors"), ("train", "x")]
)
def test_a_place_under_a_file(trained, tmp_path, command, name):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / name
    flags = TINY if command == "train" else ["--run", trained]
    outcome = forked(*flags, "--out", out, program=f"fastdit.{command}")
    assert outcome.code == 2
    assert f"error: --out {out}: cannot write into" in outcome.text
    assert "Traceback" not in outcome.text
    assert "sampling" not in outcome.text


def test_an_export_has_the_users_mode(trained, tmp_path):
    for name in ("x.pt", "x.safetensors"):
        forked("--run", trained, "--out", tmp_path / name, program="fastdit.export").succeeded()
        assert (tmp_path / name).stat().st_mode & 0o044
    assert (trained / "checkpoints/step-00000001/shards/weights-00000-of-00001.safetensors").stat().st_mode & 0o044
