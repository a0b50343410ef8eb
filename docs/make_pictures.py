"""Make every picture of the README and of docs/ and studies/ again: python docs/make_pictures.py

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
    run(browser, *options, f"--screenshot={picture}", page.resolve().as_uri())
    flat = Image.open(picture).convert("RGB").quantize(64, dither=Image.Dither.NONE)  # a third of the size
    flat.save(picture, optimize=True)


def main() -> None:
    """Make all of them."""
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
        photograph(pages / "run.html", ROOT / "docs" / "report.png", 1000, 1100)
        photograph(pages / "plan.html", ROOT / "docs" / "plan.png", 1000, 1250)
        photograph(ROOT / "studies" / "isoflop" / "report.html", ROOT / "docs" / "scaling_report.png", 1000, 1250)


if __name__ == "__main__":
    main()
