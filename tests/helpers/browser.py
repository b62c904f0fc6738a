"""Pages in headless Chromium, opened from disk, and what went wrong there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DESKTOP, PHONE = (1100, 900), (390, 844)  # width and height of the window in pixels
# WebGL 2 is drawn by the processor (SwiftShader). The other arguments keep Chromium from calling home.
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run",
    "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
_NO_WEBGL = """
const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  return kind.startsWith("webgl") ? null : get.call(this, kind, ...rest);
};
"""


class Visits:
    """Opens pages, and collects in `problems` what none may do.

    These are errors and warnings in the console, exceptions, dialogs, and requests for anything but the page itself.
    """

    def __init__(self, browser: Any, folder: Path) -> None:
        self.problems: list[str] = []
        self._browser, self._folder = browser, folder
        self._contexts: list[Any] = []

    def __call__(
        self,
        page: str | Path,
        size: tuple[int, int] = DESKTOP,
        *,
        dark: bool = False,
        webgl: bool = True,
        scripts: bool = True,
    ) -> Any:
        """Open a page, given as HTML or as its file, and return Playwright's `Page`."""
        file = page if isinstance(page, Path) else self._folder / f"page-{len(self._contexts)}.html"
        if isinstance(page, str):
            file.write_text(page, encoding="utf-8")
        scheme = "dark" if dark else "light"
        context = self._browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, java_script_enabled=scripts
        )
        self._contexts.append(context)
        if not webgl:
            context.add_init_script(_NO_WEBGL)
        tab = context.new_page()
        address = file.resolve().as_uri()
        tab.on("console", lambda message: self._note(message.text, _is_problem(message)))
        tab.on("pageerror", lambda error: self._note(str(error)))
        tab.on("request", lambda request: self._note(f"request: {request.url}", not _is_own(request.url, address)))
        tab.on("dialog", self._dismiss)
        tab.goto(address)
        return tab

    def close(self) -> None:
        """Close all pages."""
        for context in self._contexts:
            context.close()

    def _note(self, problem: str, is_problem: bool = True) -> None:
        if is_problem:
            self.problems.append(problem)

    def _dismiss(self, dialog: Any) -> None:
        self._note(f"dialog: {dialog.message}")
        dialog.dismiss()


def overflow(page: Any) -> int:
    """Pixels by which a page is wider than its window; it scrolls sideways if there are any."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def _is_problem(message: Any) -> bool:
    # The software renderer remarks that reading a canvas takes it long.
    return message.type in ("error", "warning") and "GL Driver Message (OpenGL, Performance" not in message.text


def _is_own(address: str, page: str) -> bool:
    return address.split("#")[0] == page or address.startswith(("data:", "blob:"))
