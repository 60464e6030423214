import gzip

import pytest

from ygglight.data.documents import Source, find_sources, read_documents, read_prompts


def texts(*args, **kwargs) -> list[str]:
    return [text for source in find_sources(*args, **kwargs) for text in read_documents(source)]


def test_files_directories_globs_and_lists(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.txt").write_text("ay")
    (tmp_path / "c.csv").write_text("sea")
    (tmp_path / "sub").mkdir()
    with gzip.open(tmp_path / "sub" / "d.jsonl.gz", "wt") as stream:
        stream.write('{"text": "dee"}\n\n{"text": " "}\n')
    assert texts(str(tmp_path)) == ["ay", "bee", "dee"]
    assert texts(str(tmp_path / "*.txt")) == ["ay", "bee"]
    assert texts([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]) == ["bee", "ay"]


def test_templates_and_fields(jsonl):
    assert texts(str(jsonl), template="Q: {question}\n{{A}}: {answer}")[1] == "Q: what is 1 plus 1?\n{A}: it is 2."
    assert texts(str(jsonl), field="answer")[2] == "it is 4."
    # Attributes of values are out of a template's reach.
    with pytest.raises(ValueError, match=r"no field 'answer\.__class__'"):
        texts(str(jsonl), template="{answer.__class__}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}\n{"other": 1}\n', r"rows\.jsonl:2: no field 'text'; the row has other: set `field`"),
        ('{"text": "x"}\n\n{oops\n', r"rows\.jsonl:3: not a line of JSON"),
        ("[1]\n", "not a JSON object but list"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(read_documents(Source(path)))


def test_bad_paths(tmp_path):
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(ValueError, match="text is read from"):
        find_sources(str(tmp_path / "x.csv"))
    with pytest.raises(FileNotFoundError, match=r"no \.txt, \.jsonl file"):
        find_sources(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no packaged text of that name .*gsm8k"):
        find_sources("nowhere.txt")


def test_prompts(tmp_path, jsonl):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(["a", "b"]) == ["a", "b"]
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    assert read_prompts(str(jsonl), "question")[3] == "what is 3 plus 3?"
    with pytest.raises(ValueError, match="no field 'prompt'"):
        read_prompts(str(jsonl))
    with pytest.raises(ValueError, match="not blank"):
        read_prompts(["a", " "])
