"""Every kind of file gives the same records, and each bad one a message of one line."""

import gzip
import json
import sys

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data import Examples, Fields, open_source

RECORDS = [{"question": f"é{i}\u2028?", "n": i} for i in range(5)]


def jsonl(records) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode("utf-8")


def read_all(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("name", ["a.jsonl", "a b.jsonl.gz"])
def test_jsonl_by_index_with_blank_lines_counted(tmp_path, name):
    data = jsonl(RECORDS[:2]) + b"\n  \r\n" + jsonl(RECORDS[2:]).rstrip(b"\n")
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else b"\xef\xbb\xbf" + data)
    source = open_source(str(path))
    assert read_all(source) == RECORDS
    assert source[3] == RECORDS[3]
    assert [source.where(i) for i in range(5)] == [f"{path}:{line}" for line in (1, 2, 5, 6, 7)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "x"', "train.jsonl:7: broken JSON: Expecting ',' delimiter (column 17)"),
        (b"[1]", "train.jsonl:7: expected an object {...}, came list"),
        (b'{"question": "\xff"}', "train.jsonl:7: not UTF-8 at byte 14 of the line"),
        (b'{"n": ' + b"1" * 5000 + b"}", "train.jsonl:7: JSON that cannot be read: Exceeds the "),
        (b'{"n": ' + b"[" * 200_000, "train.jsonl:7: JSON that cannot be read: maximum recursion "),
    ],
    ids=["cut", "list", "bytes", "digits", "brackets"],
)
def test_broken_line_is_found_on_opening(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl(RECORDS[:1] * 6) + line + b"\n" + jsonl(RECORDS))
    with pytest.raises(UserError) as error:
        open_source(str(path))
    said = str(error.value)
    message = f"{tmp_path}/{message}"
    assert said == message or (message.endswith(" ") and said.startswith(message))
    assert len(said) < len(message) + 200


def test_a_gzip_file_with_a_flipped_bit(tmp_path):
    data = bytearray(gzip.compress(np.random.default_rng(0).bytes(10_000)))
    data[10] ^= 0b110  # The kind of the first block: one that there is none of.
    (tmp_path / "bad.jsonl.gz").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"bad\.jsonl\.gz: not a complete gzip file"):
        open_source(str(tmp_path / "bad.jsonl.gz"))


def test_a_missing_field_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl([*RECORDS, {"n": 1}]))
    source = open_source([str(path)])
    assert Examples(source, Fields(prompt="n"))[4].prompt == "4"
    with pytest.raises(UserError, match=r"train\.jsonl:6: prompt: no field 'question'"):
        Examples(source, Fields(prompt="question"))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)
    source = open_source(str(path))
    assert read_all(source) == RECORDS
    assert source.where(2) == f"{path}:row 3"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a Parquet file"):
        open_source(str(path))


def test_array_record(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"

    def write(records):
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()

    write([json.dumps(record).encode() for record in RECORDS])
    source = open_source(str(path))
    assert read_all(source) == RECORDS
    assert source.where(2) == f"{path}:record 3"
    write([b'{"question": 1}', b"{"])
    with pytest.raises(UserError, match=r"a\.array_record:record 2: broken JSON"):
        Examples(open_source(str(path)), Fields(prompt="question"))
    for broken in (b"", b"no"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.array_record"):
            open_source(str(path))


def test_tfds_knows_data_sets_of_text_by_name(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def data_source(name, **_):
        return [{"name": tfds.builder_cls(name).name}]

    monkeypatch.setattr(tfds, "data_source", data_source)
    assert read_all(open_source("tfds:gsm8k/train")) == [{"name": "gsm8k"}]


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "question": tfds.features.Text(),
                "n": tfds.features.Scalar(np.int32),
                "steps": tfds.features.Sequence(tfds.features.Text()),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": ((i, r | {"steps": ["a", "é"]}) for i, r in enumerate(RECORDS))}

        def _generate_examples(self):
            raise NotImplementedError

    tfds.disable_progress_bar()
    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = open_source("tfds:tiny/train")
    records = sorted(read_all(source), key=lambda record: record["n"])
    assert records == [record | {"steps": ["a", "é"]} for record in RECORDS]
    assert source.where(0) == "tfds:tiny/train:record 1"
    for spec in ("tfds:tiny/none", "tfds:no_such_set/train"):
        with pytest.raises(UserError, match=f"{spec}: cannot be opened") as error:
            open_source(spec)
        assert "\n" not in str(error.value)


def test_text_of_tfds_that_is_not_utf8_is_named(monkeypatch):
    class Library:
        @staticmethod
        def data_source(name, **_):
            return [{"n": np.int32(1), "q": b"a"}, {"n": np.int32(2), "q": [b"a", b"\xff"]}]

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", Library)
    source = open_source("tfds:tiny/train")
    assert source[0] == {"n": 1, "q": "a"}
    with pytest.raises(UserError, match=r"^tfds:tiny/train:record 2: field 'q' is not UTF-8 text"):
        source[1]


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("hf:gsm8k/train", ("gsm8k", None, "train")),
        ("hf:openai/gsm8k/train", ("openai/gsm8k", None, "train")),
        ("hf:openai/gsm8k/main/train", ("openai/gsm8k", "main", "train")),
    ],
)
def test_name_and_configuration_on_the_hub(monkeypatch, spec, asked):
    class Library:
        @staticmethod
        def load_dataset(name, config, *, split):
            if (name, config, split) != asked:
                raise ValueError("no\nsuch set")
            return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", Library)
    assert read_all(open_source(spec)) == RECORDS
    with pytest.raises(UserError, match=r"^hf:x/y: cannot be .*: ValueError: no; .*/CONFIG/SPLIT"):
        open_source("hf:x/y")


def test_saved_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    splits.save_to_disk(str(tmp_path / "set"))
    assert read_all(open_source(str(tmp_path / "set" / "train"))) == RECORDS
    with pytest.raises(UserError, match=r"several splits.*\(train\)"):
        open_source(str(tmp_path / "set"))


def test_several_sources_follow_each_other(tmp_path):
    for name, records in (("a.jsonl", RECORDS[:2]), ("b.jsonl", RECORDS[2:])):
        (tmp_path / name).write_bytes(jsonl(records))
    source = open_source([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert read_all(source) == RECORDS
    assert source.where(1) == f"{tmp_path}/a.jsonl:2"
    assert source.where(2) == f"{tmp_path}/b.jsonl:1"
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.jsonl", "no such file: none.jsonl"),
        ("empty.jsonl", "empty.jsonl: no records"),
        ("blank.jsonl", "blank.jsonl: no records"),
        ("cut.jsonl.gz", "cut.jsonl.gz: not a complete gzip file"),
        ("a.csv", "a.csv: unknown kind of file; expected .jsonl"),
        (".", "not one that save_to_disk wrote"),
        ("tfds:gsm8k", "tfds:gsm8k: expected tfds:NAME/SPLIT"),
        ("hf:/train", "hf:/train: expected hf:NAME/SPLIT"),
        ([], "no source is given"),
        (["empty.jsonl"], "empty.jsonl: no records"),
    ],
)
def test_what_cannot_be_opened(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(RECORDS))[:-9])
    (tmp_path / "a.csv").write_bytes(b"a,b\n")
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:x/train: needs a package.*alignjax\[hf\]"):
        open_source("hf:x/train")


def test_real_data(real_data):
    source = open_source(str(real_data / "gsm8k" / "train.jsonl"))
    assert len(source) == 7473
    assert set(source[7472]) == {"question", "answer"}
    packed = open_source(str(real_data / "hh-rlhf" / "harmless-base-1600.jsonl.gz"))
    assert len(packed) == 1600
