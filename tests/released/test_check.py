"""Files against a manifest: what is missing, extra, unreadable, rewritten, or other weights; never green."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.codes import CODES
from ckptkit.errors import CorruptError
from ckptkit.released.examine import examine_file
from ckptkit.released.manifest_file import read_manifest
from ckptkit.released.results import CheckFinding, CheckReport

MANIFEST = "weights.lock.json"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4), "steps": torch.tensor(seed)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two released files and their manifest; the folder above it is the working directory."""
    monkeypatch.chdir(tmp_path)
    released = tmp_path / "w"
    (released / "sub").mkdir(parents=True)
    torch.save(weights(), released / "a.pth")
    save_file(weights(1), released / "sub" / "b.safetensors")
    ckptkit.manifest(["w"], f"w/{MANIFEST}")
    return released


def check(*paths: str, **options: Any) -> CheckReport:
    report = ckptkit.check(paths, manifest=f"w/{MANIFEST}", **options)
    for finding in report.findings:
        assert finding.code in CODES and finding.expected is not None and finding.found is not None
    assert report.findings == () or report.exit_code != 0
    return report


def only(report: CheckReport, path: str, code: str) -> CheckFinding:
    (finding,) = report.findings
    assert (finding.path, finding.code, finding.severity) == (path, code, "error")
    assert not report.ok
    return finding


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    change(document["files"][0])
    path.write_text(json.dumps(document))


def test_what_was_released_passes(folder: Path) -> None:
    report = check()
    assert report.exit_code == 0
    assert [(result.path, result.rules) for result in report.results] == [
        ("w/a.pth", ("readable", "manifest", "max-trust", "whole")),
        ("w/sub/b.safetensors", ("readable", "manifest", "max-trust", "whole")),
    ]
    document = report.to_dict()
    assert {key: document[key] for key in ("schema_version", "ok", "checked", "findings")} == {
        "schema_version": 1,
        "ok": True,
        "checked": 2,
        "findings": [],
    }
    assert document["manifest"] == f"w/{MANIFEST}"


def test_missing(folder: Path) -> None:
    (folder / "a.pth").unlink()
    report = check()
    assert only(report, "w/a.pth", "file-missing").rule == "manifest"
    assert report.exit_code == 1 and report.to_dict()["checked"] == 1
    assert only(check("w/a.pth"), "w/a.pth", "file-missing")
    (folder / "sub" / "b.safetensors").unlink()
    assert [finding.code for finding in check().findings] == ["file-missing"] * 2


def test_extra(folder: Path) -> None:
    torch.save(weights(2), folder / "sub" / "c.bin")
    finding = only(check(), "w/sub/c.bin", "file-extra")
    assert finding.rule == "manifest"
    assert check("w/a.pth").exit_code == 0, "paths that are named bound what is looked at"
    only(check("w/sub"), "w/sub/c.bin", "file-extra")
    only(check("w/sub/c.bin"), "w/sub/c.bin", "file-extra")


def test_only_folders_that_were_released_are_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest lies above them, among files that are none of its business."""
    monkeypatch.chdir(tmp_path)
    for name in ("w/a.pth", "w/sub/b.pth", "single/c.pth", "single/other.pth", "elsewhere/d.pth"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights(), name)
    made = ckptkit.manifest(["w", "w/sub", "single/c.pth"], "lock.json")
    assert made.folders == read_manifest("lock.json").folders == ("w",)
    assert ckptkit.check(manifest="lock.json").exit_code == 0
    torch.save(weights(), "w/sub/extra.pth")
    assert only(ckptkit.check(manifest="lock.json"), "w/sub/extra.pth", "file-extra")
    assert only(ckptkit.check(["single"], manifest="lock.json"), "single/other.pth", "file-extra")
    assert ckptkit.manifest(destination="lock.json", update=True).changes.added == ("w/sub/extra.pth",)
    assert ckptkit.check(manifest="lock.json").exit_code == 0
    document = json.loads(Path("lock.json").read_text())
    del document["folders"]
    Path("lock.json").write_text(json.dumps(document))
    found = [finding.path for finding in ckptkit.check(manifest="lock.json").findings]
    assert found == ["elsewhere/d.pth", "single/other.pth"], "a manifest that does not say it means its own folder"


@pytest.mark.parametrize("folders", [3, ["../up"], ["/root"], [1], ["a", ""]])
def test_folders_that_are_none(folder: Path, folders: object) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "folders": folders}))
    with pytest.raises(CorruptError, match="folders"):
        check()


def test_an_extra_file_is_held_to_the_policy_too(folder: Path) -> None:
    torch.save(weights(2), folder / "c.pth")
    codes = [(finding.path, finding.code) for finding in check(no_pickle=True).findings]
    assert codes == [
        ("w/a.pth", "pickle-not-allowed"),
        ("w/c.pth", "file-extra"),
        ("w/c.pth", "pickle-not-allowed"),
    ]


def test_unreadable(folder: Path) -> None:
    path = folder / "a.pth"
    path.write_bytes(path.read_bytes()[:-20])
    report = check()
    only(report, "w/a.pth", "file-unreadable")
    assert report.exit_code == 2, "could not check is not a mismatch"


def test_another_container_with_the_same_tensors(folder: Path) -> None:
    ckptkit.convert(folder / "a.pth", folder / "a.safetensors", add_module=True)
    (folder / "a.safetensors").replace(folder / "a.pth")
    finding = only(check(), "w/a.pth", "file-rewritten")
    assert "torch-zip" in finding.message and "safetensors" in finding.message
    assert "torch-zip" in finding.expected and "safetensors" in finding.found


def test_the_same_container_written_anew(folder: Path) -> None:
    torch.save({"state_dict": weights(), "epoch": 3}, folder / "a.pth")
    assert "beside" in only(check(), "w/a.pth", "file-rewritten").message


def zipped_again(path: Path) -> None:
    """The same records with another time, which nothing in a file depends on."""
    with zipfile.ZipFile(path) as old:
        records = [(record.filename, old.read(record)) for record in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records:
            new.writestr(zipfile.ZipInfo(name, (2001, 2, 3, 4, 5, 6)), data)


def test_the_whole_digest_says_what_was_rewritten(folder: Path) -> None:
    state = {"state_dict": weights(), "args": argparse.Namespace(betas=(0.9, 0.999))}
    torch.save(state, folder / "a.pth")
    ckptkit.manifest(["w"], f"w/{MANIFEST}", update=True)
    zipped_again(folder / "a.pth")
    assert "the whole digests agree" in only(check(), "w/a.pth", "file-rewritten").message
    state["args"].betas = (0.9, 0.99)
    torch.save(state, folder / "a.pth")
    assert "the whole digests differ" in only(check(), "w/a.pth", "file-rewritten").message


@pytest.mark.filterwarnings("ignore:.*quantize.* deprecated")
def test_a_manifest_from_before_whole_digests_still_holds(folder: Path) -> None:
    def saved(scale: float) -> None:
        ints = torch.ones(4, dtype=torch.int8)
        torch.save({**weights(), "q": torch._make_per_tensor_quantized_tensor(ints, scale, 0)}, folder / "a.pth")

    saved(0.1)
    made = ckptkit.manifest(["w"], f"w/{MANIFEST}", update=True)
    text = (folder / MANIFEST).read_text()
    record = next(record for record in made.files if record.path == "a.pth")
    found = examine_file(str(folder / "a.pth"), hash_file=False, digest=True, values=False)
    text = text.replace(f'      "whole_digest": "{record.whole_digest}",\n', "")
    (folder / MANIFEST).write_text(text.replace(str(record.content_digest), str(found.former_digest)))
    assert check().ok
    zipped_again(folder / "a.pth")
    assert "the content digests agree" in only(check(), "w/a.pth", "file-rewritten").message
    (folder / MANIFEST).write_text(text)
    assert "the content digests agree" in only(check(), "w/a.pth", "file-rewritten").message
    saved(0.2)
    only(check(), "w/a.pth", "tensors-differ")


@pytest.mark.parametrize("digests", ["tensor", "total"])
def test_one_flipped_bit(folder: Path, digests: Any) -> None:
    ckptkit.manifest(["w"], f"w/{MANIFEST}", digests=digests, force=True)
    path = folder / "sub" / "b.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    finding = only(check(), "w/sub/b.safetensors", "tensors-differ")
    assert finding.expected != finding.found
    if digests == "tensor":
        assert "1 with different values (" in finding.message and "of 3 tensors" in finding.message
    else:
        assert "--digests tensor" in finding.message


def test_which_tensors_are_others(folder: Path) -> None:
    changed = weights()
    del changed["fc.bias"]
    torch.save({**changed, "fc.weight": changed["fc.weight"].half(), "new": torch.ones(1), "steps": torch.tensor(9)},
               folder / "a.pth")  # fmt: skip
    message = only(check(), "w/a.pth", "tensors-differ").message
    for part in (
        "1 missing (fc.bias)",
        "1 not recorded (new)",
        "1 with another dtype or shape (fc.weight (float32 [4, 3] → float16 [4, 3]))",
        "1 with different values (steps)",
    ):
        assert part in message


def test_values_that_are_no_plain_tensors(folder: Path) -> None:
    torch.save({**weights(), "q._extra_state": {"a": 1}}, folder / "a.pth")
    assert "q._extra_state" in only(check(), "w/a.pth", "tensors-differ").message


def test_files_without_tensors(folder: Path) -> None:
    torch.save({"lr": 1}, folder / "c.pth")
    ckptkit.manifest(["w"], f"w/{MANIFEST}", update=True)
    assert check().exit_code == 0
    torch.save({"lr": 2}, folder / "c.pth")
    only(check(), "w/c.pth", "file-changed")
    torch.save(weights(), folder / "c.pth")
    assert only(check(), "w/c.pth", "tensors-differ").expected == "no tensors"


def test_a_file_that_now_runs_something(folder: Path) -> None:
    class Own:
        __reduce__ = lambda self: (print, ("hello",))  # noqa: E731

    torch.save({"state_dict": weights(), "x": Own()}, folder / "a.pth")
    codes = [finding.code for finding in check().findings]
    assert codes[:2] == ["file-rewritten", "trust-worse"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file.update(format="safetensors"), "format safetensors, and it is torch-zip"),
        (lambda file: file.update(kind="resume"), "kind resume, and it is state_dict"),
        (lambda file: file.update(tensors=None, others=["x"]), "others ['x']"),
    ],
)
def test_a_manifest_that_lies_about_the_file_of_its_hash(
    folder: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    edited(folder, change)
    assert told in only(check(), "w/a.pth", "manifest-contradicts").message


def test_the_shards_of_an_index_are_one_checkpoint(folder: Path) -> None:
    index = folder / "s.safetensors.index.json"
    ckptkit.convert(folder / "a.pth", index, max_shard_size=20)
    ckptkit.manifest(["w"], f"w/{MANIFEST}", update=True)
    assert check().exit_code == 0 and len(check().results) == 3
    shard = sorted(folder.glob("s-*"))[0]
    assert [result.path for result in check(f"w/{shard.name}").results] == [f"w/{index.name}"], "a shard covers all"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    only(check(), f"w/{index.name}", "tensors-differ")
    shard.unlink()
    assert check().exit_code == 2


def test_a_golden_belongs_to_the_manifest(folder: Path) -> None:
    ckptkit.verify(
        "w/sub/b.safetensors",
        model=Net,
        input_shapes=[[1, 3]],
        write_golden="w/golden.safetensors",
        device="cpu",
    )
    ckptkit.manifest(["w"], f"w/{MANIFEST}", update=True, golden={"w/sub/b.safetensors": "w/golden.safetensors"})
    assert check().exit_code == 0, "a golden is no extra file"
    golden = folder / "golden.safetensors"
    golden.write_bytes(golden.read_bytes() + b" ")
    assert "golden.safetensors" in only(check(), "w/sub/b.safetensors", "golden-changed").message
    golden.unlink()
    assert only(check(), "w/sub/b.safetensors", "golden-changed").found == "no such file"


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_nothing_selected_is_never_green(folder: Path) -> None:
    (folder / "empty").mkdir()
    report = check("w/empty")
    assert report.exit_code == 2
    assert [(f.path, f.code) for f in report.findings if f.code == "nothing-selected"] == [
        ("w/empty", "nothing-selected")
    ]
    alone = ckptkit.check("w/empty")
    assert alone.exit_code == 2 and alone.to_dict()["checked"] == 0 and not alone.ok


def test_a_path_that_is_not_there(folder: Path) -> None:
    report = check("w/a.pth", "w/typo.pth")
    only(report, "w/typo.pth", "file-unreadable")
    assert report.exit_code == 2


def test_the_configuration(folder: Path) -> None:
    Path("ckptkit.toml").write_text(
        f"manifest = 'w/{MANIFEST}'\nno-pickle = true\n"
        "[[overrides]]\nfiles = ['a.pth']\nno-pickle = false\nmax-size = 10\n"
    )
    only(ckptkit.check(config="ckptkit.toml"), "w/a.pth", "file-too-large")
    assert ckptkit.check(config="ckptkit.toml", max_size="1GB").exit_code == 0, "what is given goes before"
    codes = [f.code for f in ckptkit.check(config="ckptkit.toml", no_pickle=True, max_size="1GB").findings]
    assert codes == ["pickle-not-allowed"]
    Path("ckptkit.toml").write_text("paths = ['w/sub']")
    assert [result.path for result in ckptkit.check(config="ckptkit.toml").results] == ["w/sub/b.safetensors"]


def test_files_are_reported_in_the_same_order_always(folder: Path) -> None:
    for number in range(12):
        torch.save({"w": torch.zeros(1 + number * 5000)}, folder / f"{number:02}.pth")
    reports = [check("w", no_pickle=True, no_nan=True) for _ in range(3)]
    assert reports[0].findings == reports[1].findings == reports[2].findings
    assert [result.path for result in reports[0].results] == sorted(result.path for result in reports[0].results)


def test_a_failed_report_says_what_failed(folder: Path) -> None:
    (folder / "a.pth").unlink()
    (folder / "x.pth").write_bytes(b"")
    with pytest.raises(ckptkit.CkptkitError) as raised:
        check().raise_if_failed()
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("w/a.pth: file-missing: the manifest names this file")
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        ["w/x.pth", "file-extra"],
        ["w/x.pth", "file-unreadable"],
    ]


def test_a_manifest_names_which_name_of_a_file_counts(folder: Path) -> None:
    (folder / "0").hardlink_to(folder / "a.pth")
    (folder / "0.pth").symlink_to("a.pth")
    assert check().exit_code == 0 and check("w").exit_code == 0
    assert len(check("w").results) == 2


def test_links_into_a_cache_are_what_they_lead_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (folder / "a.pth").rename(tmp_path / "blobs" / "0123")
    (folder / "a.pth").symlink_to(tmp_path / "blobs" / "0123")
    (folder / "sub").rename(tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    assert check("w").exit_code == 0 and len(check("w").results) == 2
    torch.save(weights(2), tmp_path / "elsewhere" / "extra")
    only(check("w"), "w/sub/extra", "file-extra")


@pytest.mark.filterwarnings("ignore:Sparse invariant", "ignore:torch.quantize")
def test_values_whose_parts_do_not_fit(tmp_path: Path) -> None:
    good = torch.sparse_coo_tensor([[0, 3]], [1.0, 2.0], (4,))
    indices, values = good._indices().clone(), good._values()
    indices[0, 1] = 10**9
    wrong = Made(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (indices, values, torch.Size([4])))
    quantized = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8)
    function, args = quantized.__reduce_ex__(2)
    scheme = (*args[4][:3], 7)
    axis = Made(function, *args[:4], scheme, *args[5:])
    for name, value, told in (("sparse", wrong, "4"), ("quantized", axis, "axis")):
        path = tmp_path / f"{name}.pth"
        torch.save({"w": torch.ones(2), "v": value}, path)
        result = ckptkit.check([path])
        assert [finding.code for finding in result.findings] == ["malformed-value"]
        assert told in result.findings[0].message
        torch.save({"w": torch.ones(2), "v": good if name == "sparse" else quantized}, path)
        assert ckptkit.check([path]).ok


class Made:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call
