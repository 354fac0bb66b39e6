// Letters that are dragged to a rank, with mouse, finger or pen.

const START_PX = 5;

// `drop(response, slot)` is called at the end over a rank, `press()` if it was no drag at all.
export function makeDraggable(handle, drop, press) {
  // Else a quick flick counts as a fling of the page, and swallows the tap that comes next.
  handle.addEventListener("touchmove", (event) => event.preventDefault(), { passive: false });
  handle.addEventListener("pointerdown", (down) => {
    if (down.button !== 0) return;
    down.preventDefault();
    handle.setPointerCapture(down.pointerId);
    let ghost = null;
    let over = null;

    const move = (event) => {
      const distance = Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY);
      if (ghost === null && distance < START_PX) return;
      if (ghost === null) {
        ghost = handle.cloneNode(true);
        ghost.classList.add("ghost");
        document.body.append(ghost);
        handle.classList.add("dragged");
        document.body.classList.add("dragging");
      }
      ghost.style.left = `${event.clientX}px`;
      ghost.style.top = `${event.clientY}px`;
      const found = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-slot]");
      if (found !== over) {
        over?.classList.remove("over");
        found?.classList.add("over");
        over = found ?? null;
      }
    };

    const end = (event) => {
      for (const [name, listener] of listeners) handle.removeEventListener(name, listener);
      handle.classList.remove("dragged");
      document.body.classList.remove("dragging");
      over?.classList.remove("over");
      ghost?.remove();
      if (event.type !== "pointerup") return;
      if (ghost === null) press();
      else if (over !== null) drop(Number(handle.closest("[data-response]").dataset.response), over.dataset.slot);
    };

    const listeners = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
    for (const [name, listener] of listeners) handle.addEventListener(name, listener);
  });
}
