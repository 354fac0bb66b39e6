"""What each principle changed, by hand; and a page on which whatever a text holds is text."""

import html.parser
import json

import pytest

from alignjax.cli.main import main
from alignjax.report.critiques import by_principle, critique_page


def done(principle, critique, revision, num_tokens):
    return {"principle": principle, "fault": None, "critique": critique, "critique_num_tokens": 1,
            "revision": revision, "revision_num_tokens": num_tokens}  # fmt: skip


EVIL = '</div></article><script>alert(1)</script><img src="x" onerror=alert(2)> & "quotes" \ud800'
RECORDS = [
    {
        "prompt": "ask", "response": "one two three", "num_tokens": 3, "fault": None,
        "rounds": [
            done("kind", "rude", "one 2 three four", 4),
            {"principle": "short", "fault": "revision is empty", "critique": "long",
             "revision": "", "revision_num_tokens": 1},
            done("clear", "fine", "one 2 three four", 4),
        ],
        "revision": "one 2 three four", "revision_num_tokens": 4,
    },
    {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": EVIL}],
        "response": EVIL, "num_tokens": 9, "fault": None,
        "rounds": [done("short", EVIL, "ok " + EVIL, 2), done("kind", EVIL, "ok", 1)],
        "revision": "ok", "revision_num_tokens": 1,
    },
    {"prompt": "hm", "response": "", "num_tokens": 1, "fault": "response is empty", "rounds": [],
     "revision": None, "revision_num_tokens": None},
]  # fmt: skip
FIGURES = {
    "num_prompts": 3, "num_records": 3, "num_left_out": 1, "by_principle": by_principle(RECORDS),
    "constitution": {"principles": [
        {"name": n, "critique": f"<b>{n}?</b>", "revision": "better", "comparison": "which?"}
        for n in ("clear", "kind", "short")
    ]},
}  # fmt: skip


def test_what_each_principle_changed():
    assert by_principle(RECORDS) == {
        # A round is compared with the answer before it: of a round that failed nothing was taken.
        "clear": {"num_rounds": 1, "num_failed": 0, "num_changed": 0, "share_changed": 0,
                  "mean_length_change": 0},
        "kind": {"num_rounds": 2, "num_failed": 0, "num_changed": 2, "share_changed": 1,
                 "mean_length_change": ((4 - 3) + (1 - 2)) / 2},
        "short": {"num_rounds": 2, "num_failed": 1, "num_changed": 1, "share_changed": 1,
                  "mean_length_change": 2 - 9},
    }  # fmt: skip
    assert by_principle([]) == {}


class Page(html.parser.HTMLParser):
    """All tags and attributes, and the texts by the classes and tags around them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        assert self._open == [], "all that was opened is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag != "meta":
            self._open.append(dict(attrs).get("class") or tag)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    critique_page(RECORDS, FIGURES, path, title="Of <b>all</b>")
    return path.read_text(encoding="utf-8")


def test_whatever_a_text_holds_is_text(page):
    parsed = Page(page)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr",
               "th", "td", "article", "div", "del", "ins"}  # fmt: skip
    assert {*parsed.tags} <= allowed
    assert {*parsed.attributes} <= {"lang", "charset", "http-equiv", "content", "name", "class"}
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page
    shown = "".join(text for _, text in parsed.texts)
    assert EVIL[:-1] in shown and "\\ud800" in shown
    assert "Of <b>all</b>" in shown and "<b>kind?</b>" in shown


def test_what_changed_is_marked_and_stands_side_by_side(page):
    parsed = Page(page)
    assert [text for kind, text in parsed.texts if kind == "del"][:1] == [" two"]
    assert [text for kind, text in parsed.texts if kind == "ins"][:2] == [" 2", " four"]
    assert page.count('<div class="round">') == 6, "five rounds, and an answer without any"
    first = page[page.index("<article>") : page.index("</article>")]
    order = [first.index(text) for text in ("ask", "two", "critique: kind", "rude", "four")]
    assert order == sorted(order)
    assert page.count("first answer") == 2 and page.count("answer so far") == 3
    assert "revision is empty" in first and "response is empty" in page
    table = page[page.index("<table>") : page.index("</table>")]
    assert "2 of 2 (100%)" in table and "+0.0" in table and "-7.0" in table


def test_the_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "cai" / "revisions"
    run.mkdir(parents=True)
    assert main(["report", "runs/cai"]) == 2
    assert "no trace.jsonl" in capsys.readouterr().err
    lines = [json.dumps(record, ensure_ascii=True) + "\n" for record in RECORDS]
    (run / "trace.jsonl").write_text("".join(lines))
    (run / "critique.json").write_text(json.dumps(FIGURES))
    assert main(["report", "runs/cai", "--num", "1"]) == 0
    assert (run / "critiques.html").read_text().count("<article>") == 1
    assert main(["report", "runs/cai/revisions", "--out", "page.html"]) == 0
    assert (tmp_path / "page.html").read_text().count("<article>") == 3
    assert main(["report", "runs/cai", "--num", "0"]) == 2
    assert main(["report", "runs/cai", "--out", "none/page.html"]) == 2
    assert "none/page.html: No such file" in capsys.readouterr().err
    other = run.with_name("other")
    other.mkdir()
    (other / "trace.jsonl").write_text("")
    assert main(["report", "runs/cai"]) == 2
    assert "several critique runs" in capsys.readouterr().err
