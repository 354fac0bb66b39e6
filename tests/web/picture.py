"""Draws docs/img/label.png and label-phone.png: python -m tests.web.picture docs/img."""

import sys
import tempfile
from pathlib import Path

from tests.web.app_case import Server, write
from tests.web.browser import chromium

WARM_UP = [
    {"prompt": f"Name three trees ({i})", "responses": ["Oak, ash, elm.", "Elm, fir, and ivy."]}
    for i in range(18)
]
SHOWN = {
    "prompt": "Our team of six meets every Monday for an hour, and nobody likes it. "
    "How could we make it shorter?",
    "responses": [
        "Send the status updates in writing the day before, and meet only for what needs a "
        "decision. Put each decision on the agenda with a name and a number of minutes; when the "
        "list is empty, the meeting is over. Most weeks that will leave you with twenty minutes.",
        "Meetings are an important part of communication in a team. There are many ways to make "
        "them better. You could try an agenda, or you could try other things that work for you.",
        "Cancel it for three weeks. If something goes wrong that the meeting would have prevented, "
        "bring back exactly that part of it. If nothing does, you have your answer.",
        "Stand up instead of sitting down:\n\n1. people get to the point when their legs are "
        "tired,\n2. nobody opens a laptop.",
    ],
}


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        rows = [*WARM_UP[:7], SHOWN, *WARM_UP[7:]]
        responses = write(Path(scratch) / "r.jsonl", rows)
        with Server("--responses", responses, "--overlap", len(rows)) as server:
            for name, width, height, scheme in (
                ("label", 1240, 800, "light"),
                ("label-phone", 390, 800, "dark"),
            ):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme,
                    device_scale_factor=1.5,
                )  # fmt: skip
                page.goto(server.url)
                page.wait_for_selector("#name:focus")
                page.keyboard.type("Maja" if name == "label" else "Tom")
                page.keyboard.press("Enter")
                for _ in range(7):
                    page.wait_for_selector(".card:nth-child(2):last-child")
                    before = page.locator("#counts").text_content()
                    for key in ("1", "2", "Enter"):
                        page.keyboard.press(key)
                    page.wait_for_function(
                        "before => document.getElementById('counts').textContent !== before",
                        arg=before,
                    )
                page.wait_for_selector(".card:nth-child(4)")
                order = page.locator(".card > .text").all_text_contents()
                for text in order[:3]:
                    page.keyboard.press(str((2, 4, 1, 2)[SHOWN["responses"].index(text)]))
                page.evaluate("document.getElementById('toast').textContent = ''")
                page.evaluate("scrollTo(0, 0)")
                page.wait_for_timeout(400)
                page.screenshot(path=folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
