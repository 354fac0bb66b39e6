"""The page in a real browser: keys, drags, undo, reload, a phone, hostile texts, a dead server."""

import signal

import pytest

from alignjax.web import open_store
from tests.web.app_case import Server, records, write
from tests.web.browser import chromium

pytest.importorskip("uvicorn")

EVIL = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    "<b>bold</b><style>body{display:none}</style>"
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def start(browser, tmp_path):
    """Starts a server on records and opens the page; what the console says is an error."""
    servers, contexts, said = [], [], []

    def run(rows, *words, name="ann", width=1280, height=800, **options):
        responses = write(tmp_path / "r.jsonl", rows)
        server = Server("--responses", responses, *words)
        servers.append(server)
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.server, page.said = server, said
        page.goto(server.url)
        page.wait_for_selector("#name:focus")
        if name is not None:
            page.keyboard.type(name)
            page.keyboard.press("Enter")
            page.wait_for_selector(".card, #done:not([hidden])")
        return page

    yield run
    for context in contexts:
        context.close()
    for server in servers:
        server.__exit__()
    assert said == []


def shown(page):
    """The responses by their place on the page."""
    return page.locator(".card > .text").all_text_contents()


def prompt(page):
    return page.locator("#prompt .text").last.text_content()


def pressed(page):
    """Of each card the rank that is chosen, or None."""
    return page.evaluate(
        "[...document.querySelectorAll('.card')].map(card => "
        "card.querySelector('[aria-pressed=true]')?.textContent ?? null)"
    )


def press(page, keys):
    for key in keys.split():
        page.keyboard.press(key)


def said(page, text):
    page.wait_for_function(
        "text => document.getElementById('toast').textContent === text", arg=text
    )


def rankings(tmp_path):
    """What the store holds: prompt -> response -> rank."""
    store = open_store(tmp_path / "r.sqlite", None)
    found = {}
    for judgement in store.judgements():
        task = store.task(judgement.task)
        if judgement.ranks is not None:
            found[task.prompt] = dict(zip(task.responses, judgement.ranks, strict=True))
    store.close()
    return found


def test_keys_alone(start, tmp_path):
    """No mouse: sign in, rank with a tie, submit, go on."""
    page = start(records(3, responses=4))
    first = shown(page)
    press(page, "2 1 2")
    assert page.locator("#submit").is_disabled()
    press(page, "Enter")  # Too early: it says so and marks what is left.
    said(page, "Every response needs a rank first")
    assert page.locator(".card.marked .handle").text_content() == "D"
    press(page, "4 Enter")
    said(page, "Saved")
    assert prompt(page) == "Name some birds (1)"
    assert page.locator("#counts").text_content() == "1 of 3 ranked · 1 by you"
    # 2, 1, 2, 4 has a gap, which is closed.
    expected = dict(zip(first, (2, 1, 2, 3), strict=True))
    assert rankings(tmp_path) == {"Name some birds (0)": expected}
    # The mark can be moved, a rank changed or taken away.
    press(page, "ArrowDown 3 ArrowUp")
    assert pressed(page) == [None, "3", None, None]
    press(page, "k 1")
    assert pressed(page)[1] == "1" or pressed(page).count("1") == 1
    press(page, "Backspace")
    page.keyboard.press("5")  # There is no fifth rank.
    assert "5" not in pressed(page)


def test_the_mark_moves_on_to_what_has_no_rank(start):
    page = start(records(1, responses=4))
    order = []
    for key in ("ArrowDown", "1", "2", "3", "4"):
        page.keyboard.press(key)
        order.append(page.locator(".card.marked .handle").text_content())
    assert order == ["B", "C", "D", "A", "A"]
    assert pressed(page) == ["4", "1", "2", "3"]


def drag(page, source, target):
    box, goal = source.bounding_box(), target.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(goal["x"] + goal["width"] / 2, goal["y"] + goal["height"] / 2, steps=5)
    page.mouse.up()


def test_drag(start, tmp_path):
    """Letters of cards and of the board, to a rank, to another and back."""
    page = start(records(2))
    first, slots = shown(page), page.locator(".slot")
    handles, chips = page.locator(".card .handle"), page.locator(".slot .chip")
    drag(page, handles.nth(0), slots.nth(2))
    assert pressed(page) == ["2", None, None]
    drag(page, chips.filter(has_text="B"), slots.nth(1))
    drag(page, chips.filter(has_text="C"), slots.nth(1))
    assert pressed(page) == ["2", "1", "1"]
    drag(page, chips.filter(has_text="C"), slots.nth(0))
    assert pressed(page) == ["2", "1", None] and page.locator("#submit").is_disabled()
    drag(page, chips.filter(has_text="C"), page.locator("#prompt"))  # Nowhere: nothing changes.
    assert pressed(page) == ["2", "1", None] and page.locator(".ghost").count() == 0
    drag(page, handles.nth(2), slots.nth(3))
    page.locator("#submit").click()
    said(page, "Saved")
    expected = dict(zip(first, (2, 1, 3), strict=True))
    assert rankings(tmp_path) == {"Name some birds (0)": expected}


def test_drag_with_a_finger(start):
    page = start(records(1), width=375, height=700, has_touch=True, is_mobile=True)
    touch = page.context.new_cdp_session(page)
    box = page.locator(".slot .chip").first.bounding_box()
    goal = page.locator(".slot").nth(3).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    to_x, to_y = goal["x"] + goal["width"] / 2, goal["y"] + goal["height"] / 2
    touch.send(
        "Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]}
    )
    for part in range(1, 6):
        point = {"x": x + (to_x - x) * part / 5, "y": y + (to_y - y) * part / 5}
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert pressed(page) == ["3", None, None]
    page.locator(".card").nth(1).locator("button").nth(0).tap()
    assert pressed(page) == ["3", "1", None]


def test_undo(start, tmp_path):
    """First the steps of this task, then what was submitted, one after the other."""
    page = start(records(3))
    press(page, "1 2 3 Enter")
    said(page, "Saved")
    press(page, "3 2 1 Enter")
    page.wait_for_function(
        "() => document.querySelector('#prompt .text').textContent.includes('(2)')"
    )
    press(page, "1 2 u")
    assert pressed(page) == ["1", None, None]
    press(page, "u u")
    said(page, "Taken back")
    assert prompt(page) == "Name some birds (1)" and pressed(page) == ["3", "2", "1"]
    page.locator("#undo").click()
    page.wait_for_function(
        "() => document.querySelector('#prompt .text').textContent.includes('(0)')"
    )
    assert pressed(page) == ["1", "2", "3"] and rankings(tmp_path) == {}
    assert page.locator("#counts").text_content() == "0 of 3 ranked · 0 by you"
    press(page, "u")
    said(page, "There is nothing to take back")
    first = shown(page)
    press(page, "2 Enter")
    said(page, "Saved")
    assert rankings(tmp_path)["Name some birds (0)"][first[0]] == 1


def test_reload_resumes(start):
    """The same task, in the same order, with ranks, comment and flag as they were."""
    page = start(records(3))
    press(page, "1 2 3 Enter")
    said(page, "Saved")
    press(page, "2 ArrowUp f c")
    page.keyboard.type("because 1")
    press(page, "Escape c")
    page.route("**/api/draft", lambda route: route.abort())  # The last steps never arrive.
    page.keyboard.type(" is u")
    press(page, "Escape 3")
    before = (prompt(page), shown(page), pressed(page))
    page.wait_for_selector("#trouble:not([hidden])")
    page.unroute("**/api/draft")
    page.reload()
    page.wait_for_selector(".card")
    assert (prompt(page), shown(page), pressed(page)) == before
    assert before[2] == ["3", None, None]
    assert page.locator("#comment").input_value() == "because 1 is u"
    assert page.locator("#flag").get_attribute("aria-pressed") == "true"
    assert page.locator("#counts").text_content() == "1 of 3 ranked · 1 by you"
    page.said.clear()  # The browser complains of what never arrived.


def test_flag_comment_skip_and_help(start, tmp_path):
    page = start(records(2))
    press(page, "?")
    assert page.locator("#help").is_visible()
    press(page, "1 ?")
    assert not page.locator("#help").is_visible() and pressed(page) == [None] * 3
    press(page, "f f f c")
    page.keyboard.type("no birds <b>s</b>")
    press(page, "Escape s")
    said(page, "Skipped")
    assert prompt(page) == "Name some birds (1)"
    assert page.locator("#flag").get_attribute("aria-pressed") == "false"
    assert not page.locator("#comment").is_visible()
    page.locator("#skip").click()
    page.wait_for_selector("#done:not([hidden])")
    (first, second) = open_store(tmp_path / "r.sqlite", None).judgements()
    assert (first.kind, first.flagged, first.comment) == ("skip", True, "no birds <b>s</b>")
    assert (second.kind, second.flagged, second.comment) == ("skip", False, "")


def test_the_end_and_back(start):
    page = start(records(1))
    press(page, "1 2 3 Enter")
    page.wait_for_selector("#done:not([hidden])")
    assert "You ranked 1 of 1 prompts." in page.locator("#done").text_content()
    press(page, "u")
    page.wait_for_selector("#work:not([hidden])")
    assert pressed(page) == ["1", "2", "3"]


def test_a_pressed_button_does_not_take_the_next_enter(start, tmp_path):
    page = start(records(2))
    for card, rank in ((0, 2), (1, 0), (2, 1)):
        page.locator(".card").nth(card).locator("button").nth(rank).click()
    assert pressed(page) == ["3", "1", "2"]
    page.locator("#flag").click()
    press(page, "Enter")
    said(page, "Saved")
    (found,) = open_store(tmp_path / "r.sqlite", None).judgements()
    assert found.flagged


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(start, scheme):
    long = {"prompt": "w" * 400, "responses": [f"{i} " + "https://" + "x" * 300 for i in range(8)]}
    page = start([long], name=None, width=375, height=667, color_scheme=scheme)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 375
    page.keyboard.type("a name of as many characters as a name may have, which is sixty-")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")
    assert page.evaluate(width) == 375
    for text in page.locator(".text").all():
        box = text.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    for button in page.locator(".card button, .actions button").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375 and box["height"] >= 36
    press(page, "1 2 3 4 5 6 7 8 c")
    assert page.evaluate(width) == 375
    press(page, "Escape ?")
    assert page.evaluate(width) == 375
    page.goto(page.server.url + "progress")
    page.wait_for_function("() => document.getElementById('counts').textContent !== ''")
    assert page.evaluate(width) == 375


def test_texts_are_shown_as_texts(start):
    messages = [{"role": "system", "content": EVIL}, {"role": "user", "content": f"user {EVIL}"}]
    rows = [{"prompt": messages, "responses": [f"a {EVIL}", f"b\n\n  {EVIL}", "c"]}]
    page = start(rows, name=EVIL[:64])
    assert sorted(shown(page)) == [f"a {EVIL}", f"b\n\n  {EVIL}", "c"]
    assert page.locator("#prompt .text").all_text_contents() == [EVIL, f"user {EVIL}"]
    assert page.locator("#prompt .role").all_text_contents() == ["system", "user"]
    assert page.locator("#work script, #work img, #work b, #work style").count() == 0
    # Spaces and line breaks are seen, too.
    text = page.locator(".card > .text").nth(shown(page).index(f"b\n\n  {EVIL}"))
    assert text.evaluate("node => node.innerText").startswith("b\n\n  <script>")
    press(page, "1 2 3 c")
    page.keyboard.type(EVIL)
    press(page, "Escape Enter")
    page.wait_for_selector("#done:not([hidden])")
    page.goto(page.server.url + "progress")
    page.wait_for_selector("#people td")
    assert page.locator("#people td").first.text_content() == EVIL[:64]
    assert page.locator("main script, main img, main b").count() == 0
    assert page.evaluate("window.hacked") is None


def test_nothing_from_elsewhere_is_loaded_or_run(start):
    """Were HTML to get in all the same, the policy would keep it from doing anything."""
    page = start(records(1))
    page.evaluate(
        """() => {
          window.refused = [];
          addEventListener("securitypolicyviolation", (e) => refused.push(e.effectiveDirective));
          for (const [tag, key, value] of [
            ["script", "textContent", "window.hacked = 1"],
            ["script", "src", "http://127.0.0.1:1/x.js"],
            ["img", "src", "http://127.0.0.1:1/x.png"],
            ["style", "textContent", "body { color: red }"],
            ["iframe", "src", "http://127.0.0.1:1/"],
          ]) {
            const node = document.createElement(tag);
            node[key] = value;
            document.body.append(node);
          }
          fetch("http://127.0.0.1:1/").catch(() => {});
        }"""
    )
    page.wait_for_function("() => refused.length >= 6")
    assert set(page.evaluate("refused")) == {
        "script-src-elem", "img-src", "style-src-elem", "frame-src", "connect-src",
    }  # fmt: skip
    assert page.evaluate("window.hacked") is None
    page.said.clear()  # The browser complains of each.


def test_a_server_that_dies_and_comes_back(start, tmp_path):
    """Killed while somebody ranks: the page waits, and then nothing is missing."""
    page = start(records(2))
    first = shown(page)
    press(page, "3 1")
    page.wait_for_timeout(300)
    page.server.process.send_signal(signal.SIGKILL)
    page.server.process.wait()
    press(page, "2 Enter")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "not saved yet. Trying again" in page.locator("#trouble").text_content()
    with Server("--responses", tmp_path / "r.jsonl", port=page.server.port):
        said(page, "Saved")
        assert not page.locator("#trouble").is_visible()
        assert prompt(page) == "Name some birds (1)"
    expected = dict(zip(first, (3, 1, 2), strict=True))
    assert rankings(tmp_path) == {"Name some birds (0)": expected}
    page.said.clear()  # The browser complains of each attempt.


def test_a_page_never_ranks_for_another_store(start, tmp_path):
    """Another store at the same address, and a new tab of it that replaces the cookie."""
    page = start(records(2))
    press(page, "1 2")
    page.wait_for_timeout(300)
    page.server.process.kill()
    page.server.process.wait()
    press(page, "3")  # Never acknowledged: kept by the browser, for the store that it belongs to.
    others = write(tmp_path / "other.jsonl", records(2))
    with Server("--responses", others, port=page.server.port) as server:
        tab = page.context.new_page()
        tab.goto(server.url)
        tab.wait_for_selector(".card")  # The name is known.
        assert pressed(tab) == [None, None, None]
        press(page, "Enter")
        page.wait_for_function(
            "() => document.getElementById('trouble').textContent.includes('Other prompts')"
        )
        tab.reload()
        tab.wait_for_selector(".card")
        assert pressed(tab) == [None, None, None]
    assert open_store(tmp_path / "other.sqlite", None).judgements() == []
    page.said.clear()


def test_names_that_are_not_known(start):
    page = start(records(1), "--annotators", "ann,bob", name=None)
    page.fill("#name", "eve")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('sign-in-error').textContent !== ''")
    assert (
        page.locator("#sign-in-error")
        .text_content()
        .startswith("unknown annotator 'eve'; this page is for ann, bob.")
    )
    page.fill("#name", "bob")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")
    page.said.clear()  # The browser complains of the first answer.


def test_the_token_leaves_the_address(start):
    token = "a secret of one's own"
    page = start(records(1), "--token", token.replace(" ", "-"))
    assert page.url == page.server.url.partition("?")[0] and "?" in page.server.url
    page.context.clear_cookies()
    page.reload()
    page.wait_for_selector("#trouble:not([hidden])")
    assert "`alignjax label` printed" in page.locator("#trouble").text_content()
    page.said.clear()


def test_two_people_see_progress_and_agreement(start, browser):
    page = start(records(2), "--overlap", "2")
    other = browser.new_context().new_page()
    other.goto(page.server.url)
    other.wait_for_selector("#name:focus")
    other.keyboard.type("bob")
    other.keyboard.press("Enter")
    other.wait_for_selector(".card")
    for one in (page, other):
        for response in sorted(shown(one)):
            one.locator(".card", has_text=response).locator("button").nth(int(response[-1])).click()
        one.keyboard.press("Enter")
        said(one, "Saved")
    other.goto(page.server.url + "progress")
    other.wait_for_selector("#people td")
    assert other.locator("#alpha").text_content() == "1.00"
    assert other.locator("#people tbody tr").all_text_contents() == ["ann100", "bob100"]
    assert other.locator("#counts").text_content() == "1 of 2 ranked"
    other.context.close()
