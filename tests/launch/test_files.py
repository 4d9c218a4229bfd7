from pathlib import Path

import pytest

from malora_dist.errors import ConfigError
from malora_dist.launch.files import cluster_files, write_new_files


def test_nothing_is_overwritten_and_nothing_is_half_written(tmp_path: Path) -> None:
    taken = tmp_path / "slurm" / "train.sbatch"
    taken.parent.mkdir()
    taken.write_text("mine")
    with pytest.raises(ConfigError, match=r"will not overwrite .*train\.sbatch"):
        write_new_files(tmp_path / "r.yaml", "x", with_cluster_files=True)
    assert taken.read_text() == "mine" and not (tmp_path / "r.yaml").exists()


def test_what_cannot_be_written_leaves_nothing_in_the_way_of_a_second_try(tmp_path: Path) -> None:
    """A file stands where a folder belongs, or a folder where a file is written first."""
    (tmp_path / "slurm").touch()
    (tmp_path / "other" / "launchers" / ".single_node.sh.partial").mkdir(parents=True)
    for folder, at, why in (
        (tmp_path, "slurm/README.md", "Not a directory|File exists"),
        (tmp_path / "other", "launchers/single_node.sh", "Is a directory"),
    ):
        before = sorted(folder.rglob("*"))
        with pytest.raises(ConfigError, match=f"{folder / at} cannot be written: ({why})"):
            write_new_files(folder / "r.yaml", "x", with_cluster_files=True)
        assert sorted(folder.rglob("*")) == before
    (tmp_path / "slurm").unlink()
    assert write_new_files(tmp_path / "r.yaml", "x", with_cluster_files=True)


def test_cluster_files_are_written_as_they_are(tmp_path: Path) -> None:
    written = write_new_files(tmp_path / "new" / "r.yaml", "x", with_cluster_files=True)
    assert {str(path.relative_to(tmp_path / "new")) for path in written} == {"r.yaml", *cluster_files()}
    assert (tmp_path / "new/launchers/single_node.sh").stat().st_mode & 0o111
    assert (tmp_path / "new/ds_configs/zero3.json").read_text() == cluster_files()["ds_configs/zero3.json"]
