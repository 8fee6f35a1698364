"""The chat page of `jaxlm serve` in a real browser: it says what the model says, as text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import chromium
import jax
import pytest
import small

from jaxlm.data import chat
from jaxlm.generate import written
from jaxlm.generate.sampling import Sampling
from jaxlm.language_model import LanguageModel

for module in ("uvicorn", "starlette", "prometheus_client", "jinja2"):
    pytest.importorskip(module)

import serving  # noqa: E402

from jaxlm.serve.service import Served  # noqa: E402

# What a page that takes text for HTML would run, alone and after what may stand before it.
VECTORS = (
    "<script>window.bad=1</script>", "<ScRiPt>window.bad=1</ScRiPt>",
    "<script src=/evil.js></script>",
    "<script type=module>window.bad=1</script>", "<img src=x onerror=window.bad=1>",
    "<img src='x' onerror='window.bad=1'/>", "<img/src=x/onerror=window.bad=1>",
    "<svg onload=window.bad=1>", "<svg><script>window.bad=1</script></svg>",
    "<svg><animate onbegin=window.bad=1 attributeName=x dur=1s>", "<body onload=window.bad=1>",
    "<iframe src=javascript:parent.bad=1></iframe>",
    "<iframe srcdoc='<script>parent.bad=1</script>'></iframe>",
    "<object data=javascript:window.bad=1></object>", "<embed src=javascript:window.bad=1>",
    "<a href=javascript:window.bad=1 id=ask>ask</a>",
    "<details open ontoggle=window.bad=1>x</details>",
    "<input autofocus onfocus=window.bad=1>", "<video><source onerror=window.bad=1></video>",
    "<audio src=x onerror=window.bad=1></audio>", "<style>@import '/evil.css';</style>",
    "<link rel=stylesheet href=/evil.css>", "<math href=javascript:window.bad=1>x</math>",
    "<form id=form action=/evil><button>send</button></form>", "${window.bad=1}{{window.bad=1}}",
)  # fmt: skip
BEFORE = ("", "\">", "'>", "</option></select></textarea></title></style></script>-->")  # fmt: skip
PAYLOADS = [before + vector for before in BEFORE for vector in VECTORS]


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    with small.compiled_quickly():
        yield serving.model(more=PAYLOADS)


@pytest.fixture(scope="module")
def served(model: LanguageModel) -> Served:
    return serving.of(model)


@pytest.fixture(scope="module")
def page(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    """The page of a server whose models' names are the payloads, and "tiny"."""
    with (
        serving.serving({"tiny": served} | dict.fromkeys(PAYLOADS, served)) as (url, _),
        chromium.opened(url, tmp_path_factory.mktemp("profile")) as page,
    ):
        page.until("models.length", 1 + len(PAYLOADS))
        yield page


def fill(page: chromium.Page, **fields: Any) -> None:
    for name, value in fields.items():
        page.run(f"$({name!r}).value = {json.dumps(value)}")


def greedy(model: LanguageModel, said: str, n: int) -> str:
    """By the loop that `jaxlm generate` runs."""
    text = model.chat.text([{"role": "user", "content": said}], ask=True)
    ids, _ = chat.encoded(model.tokenizer, text)
    with jax.set_mesh(model.mesh):
        found = written.continuations(
            model.config, model.params, model.tokenizer, [ids, ids], n, Sampling(temperature=0), ()
        )
    return found[0].text


def test_a_message_is_answered(
    page: chromium.Page, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, step, steps = served.engine.slots, served.engine.slots.step, []

    def slowly() -> Any:
        time.sleep(0.02)
        steps.append(1)
        return step()

    monkeypatch.setattr(slots, "step", slowly)
    fill(page, model="tiny", temperature=0, max_tokens=12, ask="")
    page.run("""$("ask").focus(); window.seen = new Set();
        new MutationObserver(() => seen.add($("talk").querySelectorAll(".text")[1]?.textContent))
            .observe($("talk"), {childList: true, subtree: true})""")
    page.send("Input.insertText", text="hello <b>you</b>")
    page.press("Enter")
    page.until("running === null && $('status').textContent", "The answer is complete.")
    want = greedy(served.model, "hello <b>you</b>", 12)
    texts = "[...$('talk').querySelectorAll('.text')].map(e => e.textContent)"
    assert page.run(texts) == ["hello <b>you</b>", want] and page.run("$('ask').value") == ""
    seen = page.run("[...seen]")
    assert len(seen) > 4 and all(want.startswith(text) for text in seen)  # as it came
    fill(page, max_tokens=100, ask="once more")
    page.press("Enter")
    page.until("state.turns[1]?.answers[0].text.length > 3")
    page.run("$('stop').click()")
    page.until("running === null && $('status').textContent", "Stopped.")
    end = time.monotonic() + 10
    while served.engine.running:  # the row is free again
        assert time.monotonic() < end
        time.sleep(0.02)
    assert len(steps) < 12 + 100
    before = page.run(texts)
    page.run("document.documentElement.dataset.old = 1; location.reload()")
    page.until("document.readyState", "complete")
    page.until(
        "document.documentElement?.dataset.old === undefined && typeof models === 'object'"
        " && models.length > 0"
    )
    assert page.run(texts) == before and page.run("$('max_tokens').value") == "100"
    fill(page, max_tokens=12)
    page.run("$('talk').querySelector('button').click()")  # edit
    assert page.run(texts) == [] and page.run("$('ask').value") == "hello <b>you</b>"
    page.press("Enter")
    page.until("running === null && $('status').textContent", "The answer is complete.")
    assert page.run(texts) == ["hello <b>you</b>", want]
    page.run("$('talk').querySelectorAll('.text')[1].textContent = ''")
    page.run("[...$('talk').querySelectorAll('button')].at(-1).click()")  # regenerate
    page.until("running", None)
    assert page.run(texts) == ["hello <b>you</b>", want]
    assert page.complaints() == []


# Everything the page shows of each payload: what is said, asked, named, and told of a token.
ROUND = """(async () => {
  const found = [], tags = new Set();
  $("shown").checked = true;
  for (const text of PAYLOADS) {
    $("new").click();
    $("model").value = $("ask").value = $("system").value = text;
    $("form").requestSubmit();
    while (running) await new Promise(done => setTimeout(done, 1));
    const [mine, said] = $("talk").querySelectorAll(".text");
    said.firstChild.focus();
    const name = $("talk").querySelectorAll("h2")[1];
    found.push([mine.textContent, said.textContent, name.textContent, $("model").value]);
    if (!$("tip").textContent.includes(JSON.stringify(text))) throw new Error("tip: " + text);
    for (const e of document.querySelectorAll("body *")) tags.add(e.tagName.toLowerCase());
  }
  return [found, [...tags].sort()];
})()"""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_of_a_text_runs(
    page: chromium.Page, served: Served, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    assert len(PAYLOADS) == len(set(PAYLOADS)) == 100
    texts = PAYLOADS[::every]
    ids = [served.model.tokenizer.inner.token_to_id(text) for text in texts]
    left, slots, step = iter(ids), served.engine.slots, served.engine.slots.step

    def says() -> Any:
        said = [t._replace(id=next(left)) for t in step()]
        return [t._replace(top=[(t.id, p) for _, p in t.top]) for t in said]

    monkeypatch.setattr(slots, "step", says)
    tags = page.run("[...document.querySelectorAll('body *')].map(e => e.tagName.toLowerCase())")
    fill(page, max_tokens=1)
    found, now = page.run(ROUND.replace("PAYLOADS", json.dumps(texts)))
    assert found == [[text] * 4 for text in texts] and next(left, None) is None
    assert set(now) <= {*tags, "div", "article", "h2", "span", "button"}
    assert page.run("window.bad") is None and page.complaints() == []


def test_a_screen_reader_is_told(page: chromium.Page) -> None:
    """By the tree that Chromium gives it: whatever takes the focus has a name, in the order in
    which it is seen, and an answer is read out once, whole."""
    page.run("$('new').click(); $('settings').open = true; $('shown').checked = true")
    fill(page, model="tiny", second="tiny", temperature=0, max_tokens=4, ask="hello")
    page.run("$('form').requestSubmit()")
    page.until("running === null && state.turns[0]?.answers.length", 2)
    tree = [n for n in page.send("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]

    def of(node: dict[str, Any], name: str) -> Any:
        """A field, or a property, of a node."""
        found = {p["name"]: p["value"] for p in node.get("properties", [])}
        return (node.get(name) or found.get(name) or {}).get("value")

    takes = [n for n in tree if of(n, "focusable") and of(n, "role") != "RootWebArea"]
    assert len(takes) > 20 and all(of(n, "name") for n in takes)
    roles = {of(n, "role"): of(n, "name") for n in tree}
    assert roles["log"] == "Conversation" and {"banner", "main", "form"} <= roles.keys()
    assert [of(n, "name") for n in tree if of(n, "role") == "article"] == ["You", "tiny", "tiny"]
    said = page.run("state.turns[0].answers[0].text")
    live = [n for n in tree if of(n, "live") == "polite" and of(n, "role") == "generic"]
    assert len(live) == 1 and of(live[0], "root") is None
    assert page.run("$('heard').textContent") == 2 * f"tiny: {said} "
    order = []
    page.run("$('model').focus()")
    for _ in range(8):
        order.append(page.run("document.activeElement.id || document.activeElement.tagName"))
        page.press("Tab")
    assert order[:4] == ["model", "second", "new", "language"] and "SUMMARY" in order


def test_sources_are_shown_as_text(page: chromium.Page) -> None:
    source = {"document": PAYLOADS[4], "heading": PAYLOADS[5], "text": PAYLOADS[1]}
    answer = {"model": "tiny", "text": "so", "pieces": [], "error": "", "sources": [source]}
    turns = json.dumps([{"user": "why?", "answers": [answer]}])
    page.run(f"$('new').click(); state.turns = {turns}; show()")
    shown = page.run("[...$('talk').querySelector('details').children].map(e => e.textContent)")
    assert shown == [f"{PAYLOADS[4]} – {PAYLOADS[5]}", PAYLOADS[1]]
    assert page.run("window.bad") is None and page.complaints() == []


def test_two_models_side_by_side_on_a_phone(page: chromium.Page, served: Served) -> None:
    page.send(
        "Emulation.setDeviceMetricsOverride",
        width=390, height=800, deviceScaleFactor=1, mobile=True,
    )  # fmt: skip
    page.run("$('new').click(); $('shown').checked = false; $('settings').open = true")
    fill(page, model="tiny", second="tiny", system="", temperature=0, max_tokens=6, ask="hello")
    fill(page, token="a secret")
    page.run("$('form').requestSubmit()")
    page.until("running === null && state.turns.length && state.turns[0].answers.length", 2)
    want = greedy(served.model, "hello", 6)
    assert page.run("state.turns[0].answers.map(a => a.text)") == [want, want]
    kept = page.run("localStorage.getItem(KEY)")
    assert json.loads(kept)["turns"][0]["answers"][1]["text"] == want != "" and "secret" not in kept
    words = [page.run("$('send').textContent")]
    for _ in range(2):
        page.run("$('language').click()")
        words.append(page.run("$('send').textContent"))
        assert page.run("document.documentElement.scrollWidth") == 390
        page.run("$('preset').value = 'draft'; $('preset').onchange()")
        assert page.run("$('system').value === PRESETS.draft[state.language]")
    page.run("$('preset').value = ''; $('preset').onchange()")
    assert page.run("$('system').value") == ""
    assert sorted(set(words)) == ["Send", "送信"] and words[0] == words[2]
    same = "Object.keys(WORDS.en).sort().join() === Object.keys(WORDS.ja).sort().join()"
    assert page.run(same) and page.complaints() == []


def test_the_policy_lets_none_of_it_run(page: chromium.Page) -> None:
    """Were it taken for HTML one day."""
    page.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(''.join(PAYLOADS))})")
    page.until("document.querySelectorAll('svg').length > 0")
    time.sleep(0.2)
    assert page.run("window.bad") is None
    assert any("Content Security Policy" in told for told in page.complaints())
