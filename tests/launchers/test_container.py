"""The files that build an image."""

import re
from pathlib import Path

import pytest

from support import ROOT
from vae_ds import cli

CONTAINER = ROOT / "launchers" / "container"


def read(name: str) -> str:
    return (CONTAINER / name).read_text(encoding="utf-8")


def test_both_images_have_the_same_sources_and_the_same_environment() -> None:
    # A file that only one of them copies would be missing in the other one, and only its build would tell.
    docker = [word for line in re.findall(r"^COPY (.*)$", read("Dockerfile"), re.M) for word in line.split()[:-1]]
    files = re.search(r"^%files\n((?: .*\n)+)", read("vae_ds.def"), re.M)
    assert files is not None
    apptainer = dict(line.split() for line in files[1].splitlines())
    assert sorted(docker) == sorted(apptainer)
    assert {name: f"/opt/source/{name}" for name in apptainer} == apptainer
    assert all((ROOT / name).exists() for name in docker)
    bases = [re.search(r"BASE=(\S+)", read(name)) for name in ("Dockerfile", "vae_ds.def")]
    assert None not in bases
    assert len({base[1] for base in bases if base is not None}) == 1
    settings = [set(re.findall(r"\b[A-Z_]+=\S+", read(name))) for name in ("Dockerfile", "vae_ds.def")]
    for of_one in settings:
        assert {"VIRTUAL_ENV=/opt/vae_ds", "PYTHONNOUSERSITE=1"} < of_one


def test_an_image_has_all_that_the_installation_reads() -> None:
    words = read("Dockerfile")
    for name in re.findall(r'"([\w.]+/?[\w.]*)"', (ROOT / "setup.py").read_text(encoding="utf-8")):
        if (ROOT / name).is_file() or name == "ds_configs":
            assert name in words, name
    assert "launchers/constraints.txt" in read("install.sh")


@pytest.mark.parametrize(
    ("image", "said"), [("image.sif", "container: write an absolute path"), ("/no/image.sif", "no such image file")]
)
def test_an_image_that_is_not_there(image: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"container: {image}\n", encoding="utf-8")
    assert cli.run(["submit", "demo", "--dry-run", "--site", str(site)]) == 2
    assert said in capsys.readouterr().err
