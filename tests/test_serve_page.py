"""The server's page in a real browser: a message, its answer, its tokens, live curves; narrow and dark.

Skipped where Chromium is absent: `apt-get install chromium chromium-driver`.
"""

import json

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytest.importorskip("jinja2", reason="pip install -e '.[serve]'")

from browsing import check_page
from serving import serving, tiny_model, tiny_tokenizer

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(hf_directory, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    (runs / HOSTILE).mkdir()
    rows = [{"step": i, "train/loss": 3 / (i + 1), "lr": 0.1, "tokens_per_s": 5.0} for i in range(50)]
    (runs / HOSTILE / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    (runs / HOSTILE / "samples.jsonl").write_text(json.dumps({"step": 49, "text": HOSTILE}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptjax.decoding.prompts.CPU_CHUNK_TOKENS", 16)
        with serving(tiny_model(tiny_tokenizer(hf_directory), n_layers=1), slots=2, runs=str(runs)) as client:
            client.runs = runs
            yield client


def js(browser, script: str):
    return browser.execute_script(script)


def test_the_page_as_a_user_has_it(browser, server):
    check_page(browser, f"{server.address}/", after=lambda: server.wait(lambda: js(browser, READY)))
    js(browser, "document.getElementById('max_tokens').value = 12")
    js(browser, f"document.getElementById('message').value = {json.dumps(HOSTILE)}")
    js(browser, "document.getElementById('send').click()")
    server.wait(lambda: len(tokens(browser, "#talk")) == 12 and js(browser, IDLE))
    probabilities = [token["p"] for token in tokens(browser, "#talk")]
    assert all(0 < p <= 1 for p in probabilities) and len(set(probabilities)) > 6
    shades = {token["shade"] for token in tokens(browser, "#talk")}
    assert len(shades) > 3
    asked = js(browser, "return document.querySelector('.message.user span:last-child').textContent")
    assert asked == HOSTILE and js(browser, "return document.querySelectorAll('main img').length") == 0
    tip = js(browser, "document.querySelector('.token').focus(); return document.getElementById('tip').innerText")
    assert tip.count("%") == 6 and js(browser, "return document.getElementById('tip').checkVisibility()")


def test_the_completion_and_the_live_curves(browser, server):
    browser.get(f"{server.address}/")
    server.wait(lambda: js(browser, READY))
    js(browser, "document.getElementById('tab-complete').click()")
    js(browser, "for (const [k, v] of [['max_tokens', 9], ['temperature', 0]]) document.getElementById(k).value = v")
    js(browser, "document.getElementById('prompt').value = 'the king'; document.getElementById('go').click()")
    server.wait(lambda: len(tokens(browser, "#completion")) == 9 and js(browser, IDLE))
    wanted = server.complete("the king", temperature=0, max_tokens=9)["choices"][0]["text"]
    shown = js(browser, "return document.getElementById('completion').textContent")
    assert shown.rstrip("\ufffd") == ("the king" + wanted).rstrip("\ufffd")
    js(browser, "document.getElementById('tab-runs').click()")
    server.wait(lambda: "train/loss" in js(browser, RUNS))
    assert HOSTILE in js(browser, RUNS) and "at step 49" in js(browser, RUNS)
    with (server.runs / HOSTILE / "metrics.jsonl").open("w") as stream:
        stream.write(json.dumps({"step": 99, "train/loss": 0.5}) + "\n")
    server.wait(lambda: "at step 99" in js(browser, RUNS))
    assert js(browser, "return document.querySelectorAll('#runs img').length") == 0


def test_a_look_inside_the_text_at_hand(browser, server):
    browser.get(f"{server.address}/")
    server.wait(lambda: js(browser, READY))
    js(browser, "document.getElementById('tab-inside').click()")
    assert "other views first" in js(browser, SEEN)
    js(browser, "document.getElementById('tab-complete').click()")
    js(browser, f"document.getElementById('prompt').value = 'the king and {HOSTILE}'")
    js(browser, "document.getElementById('tab-inside').click()")
    server.wait(lambda: "tokens" in js(browser, SEEN))
    status, found = server.post("/inspect", prompt=f"the king and {HOSTILE}", layer=0, head=0)
    assert status == 200
    last = len(found["tokens"]) - 1
    assert js(browser, "return document.getElementById('read').children.length") == last + 1
    assert js(browser, "return document.querySelectorAll('main img').length") == 0
    np.testing.assert_allclose(js(browser, DOUBTS), np.sqrt(found["attention"][last]), atol=1e-3)
    assert cells(browser) == [(quoted(row[last]), percent(row[last])) for row in found["lens"]]
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true}))"
    js(browser, "document.querySelector('#read [tabindex=\"0\"]').focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        js(browser, press % key)
    assert js(browser, "return [...document.getElementById('read').children].indexOf(document.activeElement)") == 2
    np.testing.assert_allclose(js(browser, DOUBTS)[:4], [*np.sqrt(found["attention"][2]), 0], atol=1e-3)
    assert cells(browser) == [(quoted(row[2]), percent(row[2])) for row in found["lens"]]
    js(
        browser,
        "const head = document.getElementById('head'); head.value = 1; head.dispatchEvent(new Event('change'))",
    )
    other = server.post("/inspect", prompt=f"the king and {HOSTILE}", layer=0, head=1)[1]["attention"]
    assert other != found["attention"]
    server.wait(lambda: np.allclose(js(browser, DOUBTS)[:3], np.sqrt(other[2]), atol=1e-3))
    paint = "const c = document.getElementById('map'), pen = c.getContext('2d');"
    colours = "return new Set(pen.getImageData(0, 0, c.width, c.height).data).size"
    assert js(browser, f"{paint} {colours}") > 8


def test_the_look_inside_at_every_width_and_in_both_schemes(browser, server):
    def open_inside() -> None:
        server.wait(lambda: js(browser, READY))
        js(browser, "document.getElementById('tab-complete').click()")
        js(browser, "document.getElementById('prompt').value = 'the king and the queen of night speak'")
        js(browser, "document.getElementById('tab-inside').click()")
        server.wait(lambda: "tokens" in js(browser, SEEN))

    check_page(browser, f"{server.address}/", after=open_inside)


SEEN = "return document.getElementById('seen').textContent"
DOUBTS = "return [...document.getElementById('read').children].map(t => Number(t.style.getPropertyValue('--doubt')))"


def cells(browser) -> list[tuple[str, str]]:
    """The rows of the logit lens without the layer's number."""
    rows = "return [...document.querySelectorAll('#lens tbody tr')]"
    return [tuple(row) for row in js(browser, f"{rows}.map(r => [r.cells[1].textContent, r.cells[2].textContent])")]


def quoted(cell: dict) -> str:
    return json.dumps(cell["text"], ensure_ascii=False)


def percent(cell: dict) -> str:
    return f"{100 * cell['probability']:.1f} %"


READY = "return document.getElementById('state').textContent.includes('context')"
IDLE = "return document.querySelector('.stop').disabled"
RUNS = "return document.getElementById('runs').innerText"


def tokens(browser, inside: str) -> list[dict]:
    return js(
        browser,
        f"return [...document.querySelectorAll('{inside} .token')].map(t => "
        "({p: Number(t.dataset.p), shade: getComputedStyle(t).backgroundColor}))",
    )
