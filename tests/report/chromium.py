"""Opens a page in the Chromium of Qt WebEngine, without a screen: `python chromium.py PAGE DIR light|dark`.

A process of its own, because an application of Qt lives as long as its process. Prints one JSON object: what the
script below found, the messages of the console, and every address that the page asked for. DIR gets `SCHEME.png`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LOOK = Path(__file__).with_name("look.js")
WIDTH = 1180
HEIGHT = 9000
"""Pixels of the window, and of the screenshot."""
PATIENCE_MS = 20_000


def look_at(page_file: Path, directory: Path, scheme: str) -> dict[str, Any]:
    """Load the page, look at it, take its picture."""
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # tests run as root
    preferred = {"dark": 0, "light": 1}[scheme]  # mojom::PreferredColorScheme
    flags = f"--disable-gpu --no-sandbox --blink-settings=preferredColorScheme={preferred}"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = flags
    from PySide6.QtCore import QElapsedTimer, QTimer, QUrl
    from PySide6.QtGui import QImage
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    found: dict[str, Any] = {"console": [], "requests": []}

    def on_request(_: Any, info: Any) -> None:
        found["requests"].append(info.requestUrl().toString())

    def on_message(_: Any, level: Any, message: str, line: int, source: str) -> None:
        found["console"].append(f"{level.name}: {message} ({source}:{line})")

    interceptor_type = type("Interceptor", (QWebEngineUrlRequestInterceptor,), {"interceptRequest": on_request})
    page_type = type("Page", (QWebEnginePage,), {"javaScriptConsoleMessage": on_message})
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    page, interceptor = page_type(view), interceptor_type(view)
    page.setUrlRequestInterceptor(interceptor)
    view.setPage(page)
    view.resize(WIDTH, HEIGHT)  # as tall as a report: what is drawn at first is in the picture
    view.show()

    def keep(answer: str) -> None:
        found.update(json.loads(answer))
        shoot()

    def shoot() -> None:
        """Chromium draws tile by tile: try again until every picture has more than one colour."""
        image = view.grab().toImage().copy(0, 0, WIDTH, min(HEIGHT, found["height"]))
        parts = {plot["id"]: image.copy(*plot["box"]) for plot in found["plots"]}
        found["drawn"] = [name for name, part in parts.items() if colours(part) > 1]
        if len(found["drawn"]) < len(parts) and clock.elapsed() < PATIENCE_MS:
            QTimer.singleShot(200, shoot)
            return
        image.save(str(directory / f"{scheme}.png"))
        application.quit()

    def colours(image: QImage) -> int:
        """Of every eighth pixel of the lower half, where tiles come last."""
        height, width = image.height(), image.width()
        return len({image.pixel(x, y) for y in range(height // 2, height, 8) for x in range(0, width, 8)})

    clock = QElapsedTimer()
    clock.start()
    page.loadFinished.connect(lambda _: page.runJavaScript(LOOK.read_text(encoding="utf-8"), 0, keep))
    page.load(QUrl.fromLocalFile(str(page_file.resolve())))
    QTimer.singleShot(60_000, application.quit)
    application.exec()
    return found


if __name__ == "__main__":
    result = look_at(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # Qt's own threads outlive its objects here
