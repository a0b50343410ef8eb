"""Make every picture of the README and of docs/ and studies/ again: python docs/make_pictures.py
`python docs/make_pictures.py --server MODEL` makes the server's, with a model that was tuned on conversations.

Needs pip install -e '.[demo,scaling,report]' and Chromium (apt-get install chromium) for the screenshots of pages.
The quickstart's run is made first, in minutes, where runs/quickstart does not hold it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
GPTJAX = (sys.executable, "-m", "gptjax")
INSIDE = "The capital of France is Paris, and the capital of Italy is"  # looked into, with this layer and head
LAYER, HEAD = 15, 4
PLAN = ("configs/gpt2_1.5b.yaml", "--topology", "v5e:8x8", "--search", "--analytic", "--tokens", "300e9")


def run(*command: str) -> None:
    """Run a command of the project from its root, and show it."""
    print("$", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Write what Chromium shows of a page, without a network."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    options = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    )
    command = (browser, *options, f"--screenshot={picture}", page.resolve().as_uri())
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # Chromium complains of services that it lacks
    flatten(picture)


def flatten(picture: Path) -> None:
    """Write a picture again with few colours, in a third of the size."""
    image = Image.open(picture).convert("RGB")
    flat = image.quantize(96, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # keeps rare colours
    flat.save(picture, optimize=True)


def photograph_server(model: str, talk: Path, inside: Path) -> None:
    """Write what the server's page shows: a conversation with a token's alternatives, and a look inside a text."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    command = [*GPTJAX, "serve", model, "--port=0", "--slots=2", "--context=512"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,760"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(server.stdout.readline().split()[2])
        for number, question in enumerate(("What is the capital of France?", "Name three rivers there.")):
            browser.execute_script("document.getElementById('temperature').value = 0")
            browser.execute_script("document.getElementById('max_tokens').value = 60")
            browser.execute_script("document.getElementById('message').value = arguments[0]", question)
            browser.execute_script("document.getElementById('send').click()")
            script = f"return turns.length === {2 * number + 2}"
            WebDriverWait(browser, 300).until(lambda b, script=script: b.execute_script(script))
        doubtful = "const t = [...document.querySelectorAll('.token')]; t.sort((a, b) => a.dataset.p - b.dataset.p);"
        browser.execute_script(doubtful + "t[0].focus()")
        browser.save_screenshot(str(talk))
        browser.set_window_size(900, 960)
        browser.execute_script("document.getElementById('tab-complete').click()")
        browser.execute_script("document.getElementById('prompt').value = arguments[0]", INSIDE)
        browser.execute_script("document.getElementById('tab-inside').click()")
        seen = "return document.getElementById('seen').textContent.endsWith('tokens')"
        WebDriverWait(browser, 300).until(lambda b: b.execute_script(seen))
        for name, number in (("layer", LAYER), ("head", HEAD)):
            browser.execute_script(f"document.getElementById('{name}').value = {number}")
        browser.execute_script("inside = null; lookInside()")
        WebDriverWait(browser, 300).until(lambda b: b.execute_script("return inside !== null"))
        browser.save_screenshot(str(inside))
    finally:
        browser.quit()
        server.terminate()
        server.wait(60)
    for picture in (talk, inside):
        flatten(picture)


def main() -> None:
    """Make all of them, or the server's alone."""
    if sys.argv[1:2] == ["--server"]:
        photograph_server(sys.argv[2], ROOT / "docs" / "serving.png", ROOT / "docs" / "serving_inside.png")
        return
    quickstart = ROOT / "runs" / "quickstart"
    run(sys.executable, "train.py", "configs/quickstart.yaml")
    shutil.copy(quickstart / "loss.png", ROOT / "docs" / "quickstart.png")
    for study in ("isoflop", "batch"):
        run(*GPTJAX, "scaling", "plot", f"studies/{study}")
    run(sys.executable, "studies/lr_transfer/run.py", "--report")
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        run(*GPTJAX, "report", "runs/quickstart", "--out", str(pages / "run.html"))
        run(*GPTJAX, "plan", *PLAN, "--html", str(pages / "plan.html"))
        run(*GPTJAX, "scaling", "report", "studies/isoflop")
        photograph(pages / "run.html", ROOT / "docs" / "report.png", 1000, 840)
        photograph(pages / "plan.html", ROOT / "docs" / "plan.png", 1000, 895)
        photograph(ROOT / "studies" / "isoflop" / "report.html", ROOT / "docs" / "scaling_report.png", 1000, 1185)


if __name__ == "__main__":
    main()
