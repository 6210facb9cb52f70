"""Judges: what they say is read strictly, what they do not say is never safe, nothing is lost."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import chatting
import tiny_model
from suture.errors import CheckpointError, SutureError
from suture.evals import judged, judges, verdicts
from suture.evals.endpoint import PATIENCE
from suture.evals.kinds import EvalJob, Models, Prepare, Score
from suture.evals.refusal_model import (
    Labelled,
    cross_validated,
    features,
    quality,
    train_refusal_classifier,
)
from suture.training.models import save_head

ROWS = [{"prompt": word} for word in ("one", "two", "three", "red", "blue", "green")]
SAID = {0: "I cannot.", 1: "Sure, it is red.", 2: "Sure, here it is.", 3: "Never ask me.",
        4: "no " * 30, 5: "Here it is."}  # fmt: skip
"""What the model says in these tests; row 4 is no language."""


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Answers are given, and the user's cache is a new folder."""
    monkeypatch.setattr(judged, "generate", lambda models, job, asked: dict(SAID))
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "cache"))


def say(to: BaseHTTPRequestHandler, what: object) -> None:
    """Text, a state, raw bytes, something after a wait, headers of elsewhere, or slow bytes."""
    state, content = 200, b""
    headers: dict[str, str] = {}
    if isinstance(what, float):
        time.sleep(what)
        what = "safe"
    if isinstance(what, dict):
        state, headers = 302, what
    elif isinstance(what, int):
        state = what
    elif isinstance(what, bytes):
        content = what
    elif not isinstance(what, list):
        message = {"choices": [{"message": {"content": what}}]}
        content = json.dumps(message).encode()
    waits = what if isinstance(what, list) else []
    to.send_response(state)
    for name, value in headers.items():
        to.send_header(name, value)
    to.send_header("Content-Length", str(len(content or waits)))
    to.end_headers()
    to.wfile.write(content)
    for wait in waits:
        time.sleep(wait)
        to.wfile.write(b" ")


class Server:
    """A judge on this machine that answers as ``reply`` says."""

    def __init__(self, reply: Callable[[str, int], object]) -> None:
        self.questions: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.most = self.now = self.asked = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                say(self, "refusal")

            def do_POST(self) -> None:
                outer.asked += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with lock:
                    outer.questions.append(question)
                    outer.headers.append(dict(self.headers))
                    number = outer.questions.count(question)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    say(self, reply(question, number))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # nobody waits any more
                finally:
                    with lock:
                        outer.now -= 1

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, int], object]], Server]]:
    """Starts servers and closes them afterwards."""
    running: list[Server] = []

    def start(reply: Callable[[str, int], object]) -> Server:
        running.append(Server(reply))
        return running[-1]

    yield start
    for server in running:
        server.close()


def ask(make: Prepare, job: EvalJob, reference: Any = None) -> dict[str, Score]:
    """The scores of a kind, by name; the model says what ``SAID`` has."""
    run = make(job)
    job.problems.raise_if_any()
    return {s.name: s for s in run(Models(chatting.llama(), reference=reference))}


def refused_with(make: Prepare, folder: Path = Path()) -> str:
    """What is told about a judge before a model is asked."""
    job = chatting.job(ROWS)
    job.folder = folder
    make(job)
    with pytest.raises(SutureError) as caught:
        job.problems.raise_if_any()
    return str(caught.value)


def at(server: Server, **more: Any) -> dict[str, Any]:
    return {"url": server.url, "model": "tiny", "wait": 0.0, "retries": 0, **more}


def honest(question: str, number: int) -> str:
    """Says ``refusal`` where the answer says no."""
    answer = question.split("<answer>")[1]
    return "Refusal." if "cannot" in answer or "Never" in answer else "compliance"


def test_a_server_judges_refusals(serve: Any) -> None:
    """Each answer that is language is asked about once; the broken one is never a refusal."""
    server = serve(honest)
    found = ask(judged.judged(judge=at(server, concurrency=2)), chatting.job(ROWS))

    assert found["refused"].values == {0: 1, 1: 0, 2: 0, 3: 1, 4: 0, 5: 0}
    assert found["broken"].values == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 0}
    assert sum(found["unparsed"].values.values()) == 0
    assert len(server.questions) == 5
    assert server.most <= 2


def test_where_an_answer_is_expected_broken_ones_are_none(serve: Any) -> None:
    """Over-refusal counts refused, broken and unparsed rows alike."""
    server = serve(lambda q, n: "eh?" if "Here" in q else honest(q, n))
    found = ask(judged.judged(judge=at(server), expect="answer"), chatting.job(ROWS))

    assert next(iter(found)) == "unanswered"
    assert found["unanswered"].values == {0: 1, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert found["unparsed"].values[5] == 1


@pytest.mark.parametrize("rubbish", ["I do not know", "", "not harmful", b"<html>", b"{}", b"\xff"])
def test_rubbish_is_counted_and_never_safe(serve: Any, rubbish: object) -> None:
    """What cannot be read is ``unparsed``; the other rows keep their verdicts."""
    server = serve(lambda q, n: rubbish if "red" in q.split("<answer>")[1] else "safe")
    found = ask(judged.judged(judge=at(server), asks="harm"), chatting.job(ROWS))

    assert found["safe"].values == {0: 1, 1: 0, 2: 1, 3: 1, 4: 0, 5: 1}
    assert found["harmful"].values == dict.fromkeys(range(6), 0)
    assert found["unparsed"].values == {0: 0, 1: 1, 2: 0, 3: 0, 4: 0, 5: 0}


def test_a_judge_that_times_out_once_is_asked_again(serve: Any) -> None:
    """A retry is worth its wait; a row that stays without an answer is not safe."""
    server = serve(lambda q, n: 5.0 if "red" in q.split("<answer>")[1] and n == 1 else "safe")
    judge = at(server, timeout=0.5, retries=1)
    found = ask(judged.judged(judge=judge, asks="harm"), chatting.job(ROWS))
    assert sum(found["safe"].values.values()) == 5

    slow = serve(lambda q, n: 5.0 if "red" in q.split("<answer>")[1] else "safe")
    found = ask(judged.judged(judge=at(slow, timeout=0.3), asks="harm"), chatting.job(ROWS))
    assert found["safe"].values[1] == 0
    assert found["unparsed"].values[1] == 1


def test_a_server_that_is_gone_stops_the_run_and_nothing_is_asked_twice(serve: Any) -> None:
    """The error says what to do; verdicts are kept without texts, and the next run goes on."""
    left = [2]  # questions that are answered before the server is gone

    def reply(question: str, number: int) -> object:
        left[0] -= 1
        return honest(question, number) if left[0] >= 0 else 503

    server = serve(reply)
    make = judged.judged(judge=at(server, concurrency=1))
    with pytest.raises(SutureError, match="goes on with what has been judged"):
        ask(make, chatting.job(ROWS))
    assert len(server.questions) == 2 + PATIENCE
    key = judges.judge_of(at(server), "refusal", Path()).key
    kept = verdicts.verdict_file(key)
    assert len(kept.read_text().split()) == 4  # two hashes, two digits
    assert not any(word in kept.read_text() for word in ("cannot", "Sure", "one"))

    left[0] = 100
    found = ask(make, chatting.job(ROWS))
    assert found["refused"].values == {0: 1, 1: 0, 2: 0, 3: 1, 4: 0, 5: 0}
    assert len(server.questions) == 2 + PATIENCE + 3


@pytest.mark.parametrize("state", [401, 404, 400])
def test_a_server_that_refuses_is_an_error_at_once(serve: Any, state: int) -> None:
    """A wrong address, model or key is not tried again."""
    server = serve(lambda q, n: state)
    with pytest.raises(SutureError, match=f"HTTP {state}"):
        ask(judged.judged(judge=at(server, retries=5, concurrency=1)), chatting.job(ROWS))
    assert len(server.questions) == 1


def test_prompts_and_keys_go_to_no_other_address(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends elsewhere is an error: what it sends to would get the key."""
    monkeypatch.setenv("JUDGE_KEY", "abc")
    other = serve(lambda q, n: "refusal")
    server = serve(lambda q, n: {"Location": f"{other.url}/chat/completions"})
    with pytest.raises(SutureError, match="HTTP 302"):
        ask(judged.judged(judge=at(server, key_env="JUDGE_KEY")), chatting.job(ROWS))
    assert other.asked == 0
    assert server.asked > 0


def test_a_server_that_drips_is_not_waited_for_longer(serve: Any) -> None:
    """The time for a question is that of the whole answer, not of each byte."""
    server = serve(lambda q, n: [0.1] * 50)
    begun = time.monotonic()
    with pytest.raises(SutureError, match="timed out"):
        judge = at(server, timeout=0.3, retries=0)
        ask(judged.judged(judge=judge), chatting.job(ROWS))
    assert time.monotonic() - begun < 3


def test_a_server_that_does_not_exist_is_an_error() -> None:
    """No verdict is made up."""
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "wait": 0.0}
    with pytest.raises(SutureError, match="no answer in 1 attempts"):
        ask(judged.judged(judge=judge), chatting.job(ROWS))


def test_a_key_is_read_from_the_environment(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites name the variable, never the key; it is sent as a bearer token."""
    server = serve(honest)
    make = judged.judged(judge=at(server, key_env="JUDGE_KEY"))
    assert "JUDGE_KEY is not set" in refused_with(make)
    monkeypatch.setenv("JUDGE_KEY", "abc")
    ask(make, chatting.job(ROWS))
    assert {h["Authorization"] for h in server.headers} == {"Bearer abc"}


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"url": "file:///etc/passwd", "model": "m"}, "no http"),
        ({"url": "http://h/v1"}, "which model"),
        ({"url": "http://h/v1", "model": "m", "timeout": "long"}, "judge.timeout"),
        ({"url": "http://h/v1", "model": "m", "concurrency": 0}, "1 to 64"),
        ({"python": "nothing"}, "module:function"),
        ({"python": "json:nothing"}, "json has no nothing"),
        ({"python": "no_such_module:f"}, "cannot be imported"),
        ({"classifier": "nowhere"}, "no model folder"),
        (
            {"encoder": "nowhere", "head": "none.safetensors"},
            "none.safetensors is no file",
        ),
        ({"encoder": "nowhere"}, "is no file; train a classifier"),
    ],
)
def test_judges_that_are_none_are_told_before_a_model_is_asked(
    judge: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """With what is wrong and what to do."""
    assert told in refused_with(judged.judged(judge=judge), tmp_path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("http://h", "not 'http://h'"),
        ({}, "0 of them"),
        ({"url": "x", "python": "y"}, "2 of them"),
        ({"url": "x", "modle": "y"}, "unknown key 'modle'"),
    ],
)
def test_the_option_is_one_kind_of_judge(value: object, told: str) -> None:
    """Unknown keys are refused."""
    assert told in str(judges.JUDGED.problem(value))


@pytest.mark.parametrize(
    ("text", "harm", "refusal"),
    [
        ("unsafe", True, None),
        ("safe", False, None),
        ("Unsafe. It is not safe at all", True, None),
        ("This is not safe.", True, None),
        ("It isn't safe", True, None),
        ("safe or unsafe?", True, None),
        ("harmful", True, None),
        ("not unsafe", None, None),
        ("safety first", None, None),
        ("Refusal", None, True),
        ("compliance", None, False),
        ("The assistant refuses.", None, True),
        ("refusal or compliance", None, None),
        ("not a refusal", None, None),
        ("", None, None),
    ],
)
def test_what_judges_say_is_read_strictly(
    text: str, harm: bool | None, refusal: bool | None
) -> None:
    """``unsafe`` comes before ``safe``; what is not clear is no verdict, and never safe."""
    assert judges.harmful(text) is harm
    assert judges.refuses(text) is refusal


@pytest.mark.parametrize(
    ("text", "value"),
    [("A", 1.0), ("B.", 0.0), ("tie", 0.5), ("Answer: B", 0.0), ("a", 1.0), ("A or B", None),
     ("neither", None), ("", None)],
)  # fmt: skip
def test_what_judges_say_of_pairs(text: str, value: float | None) -> None:
    """One letter, or a tie."""
    assert judges.less_harmful(text) == value


def test_pairs_are_judged_in_both_orders(serve: Any) -> None:
    """A judge that always names the first answer finds no difference."""
    first = serve(lambda q, n: "A")
    reference = chatting.llama(1)
    found = ask(
        judged.preferred(judge=at(first), max_perplexity=1e9), chatting.job(ROWS), reference
    )
    assert found["preferred"].values == {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0, 5: 0.5}
    assert found["broken"].values[4] == 1
    assert len(first.questions) == 10


def test_a_pair_with_a_verdict_that_cannot_be_read_is_lost(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts for the reference and is told."""
    reference = chatting.llama(1)
    other = {n: "Sure, the sun." for n in SAID}
    monkeypatch.setattr(
        judged, "generate",
        lambda models, job, asked: dict(other if models.model is reference else SAID),
    )  # fmt: skip

    def reply(question: str, number: int) -> str:
        if "Never" in question:
            return "hm"
        return (
            "A"
            if "cannot" in question.split("Answer B")[0]
            else ("B" if "cannot" in question else "tie")
        )

    found = ask(
        judged.preferred(judge=at(serve(reply)), max_perplexity=1e9), chatting.job(ROWS), reference
    )
    assert found["preferred"].values == {0: 1.0, 1: 0.5, 2: 0.5, 3: 0.0, 4: 0.0, 5: 0.5}
    assert found["unparsed"].values == {0: 0, 1: 0, 2: 0, 3: 1, 4: 0, 5: 0}


def test_pairs_that_were_judged_are_not_asked_again(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is gone after three of ten pairs: the next run asks for seven, ties are kept."""
    reference, left = chatting.llama(1), [3]
    monkeypatch.setattr(
        judged, "generate",
        lambda models, job, asked: {
            n: f"{text} Yes." if models.model is reference else text for n, text in SAID.items()
        },
    )  # fmt: skip

    def reply(question: str, number: int) -> object:
        left[0] -= 1
        word = (
            "tie"
            if "\none\n" in question
            else "A"
            if "Yes" in question.split("Answer B")[1]
            else "B"
        )
        return word if left[0] >= 0 else 503

    server = serve(reply)
    make = judged.preferred(judge=at(server, concurrency=1), max_perplexity=1e9)
    with pytest.raises(SutureError, match="goes on with what has been judged"):
        ask(make, chatting.job(ROWS), reference)
    first = len(server.questions)
    kept = verdicts.verdict_file(judges.comparer_of(at(server)).key).read_text()
    assert first >= 3 + PATIENCE
    assert sorted(kept.split()[1::2]) == ["0.5", "1", "1"]
    assert not any(word in kept for word in ("cannot", "Sure", "Yes"))

    left[0] = 100
    for questions in (7, 0):
        found = ask(make, chatting.job(ROWS), reference)
        assert found["preferred"].values == {0: 0.5, 1: 1, 2: 1, 3: 1, 4: 0, 5: 1}
        first += questions
        assert len(server.questions) == first
    ask(
        judged.preferred(judge=at(server), keep="no", max_perplexity=1e9),
        chatting.job(ROWS),
        reference,
    )
    assert len(server.questions) == first + 10


def test_a_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets prompt and answer; anything but true and false is no verdict."""
    (tmp_path / "own_judge.py").write_text(
        "def refused(prompt, answer):\n"
        "    return 'maybe' if prompt == 'two' else 'cannot' in answer\n"
        "def pair(prompt, a, b):\n"
        "    return 'A' if len(a) < len(b) else 'B' if len(b) < len(a) else 'tie'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = ask(judged.judged(judge={"python": "own_judge:refused"}, keep="no"), chatting.job(ROWS))
    assert found["refused"].values == {0: 1, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0}
    assert found["unparsed"].values[1] == 1
    pairs = ask(judged.preferred(judge={"python": "own_judge:pair"}, max_perplexity=1e9), chatting.job(ROWS),
                chatting.llama(1))  # fmt: skip
    assert pairs["preferred"].values[0] == 0.5


def test_a_function_that_fails_is_an_error_without_the_words_of_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kind and place are told; what an exception says may be the prompt."""
    (tmp_path / "failing_judge.py").write_text(
        "def fails(prompt, answer):\n    raise KeyError(prompt)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SutureError, match=r"KeyError in .*failing_judge.py, line 2") as caught:
        ask(judged.judged(judge={"python": "failing_judge:fails"}), chatting.job(ROWS))
    assert "one" not in str(caught.value).replace(str(tmp_path), "")
    with pytest.raises(SutureError, match="called with 3 texts, fails: TypeError$"):
        ask(judged.preferred(judge={"python": "failing_judge:fails"}), chatting.job(ROWS),
            chatting.llama(1))  # fmt: skip


@pytest.mark.parametrize("make", [judged.judged, judged.preferred])
def test_a_function_that_was_changed_is_another_judge(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept verdicts and results are not those of the words that once stood there."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_judge", raising=False)
    stamps = set()
    for text in ("return True", "return not True"):
        (tmp_path / "edited_judge.py").write_text(f"def f(*texts):\n    {text}\n")
        job = chatting.job(ROWS)
        make(judge={"python": "edited_judge:f"})(job)
        stamps.add(job.stamp)
    assert len(stamps) == 2


def test_pairs_need_a_judge_that_compares() -> None:
    """Classifiers look at one answer."""
    assert "pairs are judged" in refused_with(judged.preferred(judge={"classifier": "x"}))


def test_a_text_classifier_judges(tmp_path: Path) -> None:
    """A published classifier with its own head; the label that means yes is named."""
    config = transformers.BertConfig(
        vocab_size=len(tiny_model.WORDS), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
        id2label={0: "fine", 1: "refused"}, label2id={"fine": 0, "refused": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "judge")
    words = tiny_model.tokenizer()
    words.save_pretrained(str(tmp_path / "judge"))
    job = chatting.job(ROWS)
    job.folder = tmp_path

    found = ask(judged.judged(judge={"classifier": "judge", "positive": "refused"}), job)

    for n, text in SAID.items():
        ids = words([text], truncation=True, max_length=64)["input_ids"]
        with torch.inference_mode():
            expected = int(model(torch.tensor(ids)).logits.argmax())
        assert found["refused"].values[n] == (0 if n == 4 else expected)

    def key() -> str:
        judge = {"classifier": "judge", "positive": "refused"}
        return judges.judge_of(judge, "refusal", tmp_path).key

    before = key()
    assert before == key()
    model.classifier.bias.data.add_(1)
    model.save_pretrained(tmp_path / "judge")
    assert key() != before, "kept verdicts must not be those of a model that was trained again"
    (tmp_path / "body").mkdir()
    (tmp_path / "body" / "config.json").write_text("{}")
    told = refused_with(judged.judged(judge={"classifier": "body", "positive": "x"}), tmp_path)
    assert "is no classifier: its config.json names no labels" in told
    told = refused_with(judged.judged(judge={"classifier": "judge", "positive": "no"}), tmp_path)
    assert "which label means yes" in told
    for missing, why in (("model.safetensors", "without a .safetensors file"),
                         ("tokenizer.json", "its tokenizer cannot be loaded")):  # fmt: skip
        shutil.copytree(tmp_path / "judge", tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        judge = {"classifier": missing, "positive": "refused"}
        with pytest.raises(CheckpointError, match=why):  # before any model is loaded
            judges.judge_of(judge, "refusal", tmp_path)


def labelled() -> list[Labelled]:
    """Answers about colours or about the sky: the latter play refusals."""
    return [
        Labelled(f"{row.group} five", row.text, row.label == "sky") for row in tiny_model.rows(48)
    ]


def test_a_refusal_classifier_is_trained_saved_and_judges(tmp_path: Path) -> None:
    """Cross-validated by group, saved as a small file, read back by a suite."""
    folder = tiny_model.folder(tmp_path / "encoder")
    found = train_refusal_classifier(folder, labelled(), tmp_path / "refusals.safetensors")

    assert found.accuracy.value > 0.9
    assert found.accuracy.n == 48
    assert (tmp_path / "refusals.safetensors").stat().st_size < 10_000
    job = chatting.job(ROWS)
    job.folder = tmp_path
    judge = {"encoder": "encoder", "head": "refusals.safetensors"}
    made = judges.judge_of(judge, "refusal", tmp_path)
    rows = labelled()
    told = verdicts.decided(made, [r.prompt for r in rows], [r.answer for r in rows], None)
    assert sum(v is r.refuses for v, r in zip(told, rows, strict=True)) >= 46
    assert "refusals only" in refused_with(judged.judged(judge=judge, asks="harm"), tmp_path)


def test_a_head_for_other_labels_is_no_refusal_classifier(tmp_path: Path) -> None:
    """Nor is one for another encoder."""
    from suture.training.models import Head

    folder = tiny_model.folder(tmp_path / "encoder")
    save_head(Head(("a", "b"), torch.zeros(2, 16), torch.zeros(2)), tmp_path / "other.safetensors")
    judge = {"encoder": str(folder), "head": str(tmp_path / "other.safetensors")}
    assert "no refusal classifier" in refused_with(judged.judged(judge=judge))


def test_held_out_rows_are_judged_by_a_classifier_that_has_not_seen_them(tmp_path: Path) -> None:
    """With labels drawn by lot, cross-validation finds no skill where fitting would find much."""
    folder = tiny_model.folder(tmp_path / "encoder")
    draw = torch.Generator().manual_seed(3)
    rows = [
        Labelled(r.prompt, r.answer, bool(torch.rand(1, generator=draw) < 0.5)) for r in labelled()
    ]
    vectors = features(folder, rows)
    found = quality(cross_validated(vectors, rows), [r.refuses for r in rows])
    assert found.accuracy.value < 0.75


def test_quality_counts() -> None:
    """Precision is of what is called a refusal, recall of what is one; none called: no number."""
    found = quality([True, True, False, False], [True, False, True, False])
    assert (found.accuracy.value, found.precision.value, found.recall.value) == (0.5, 0.5, 0.5)
    none = quality([False, False], [True, False])
    assert none.precision.n == 0
    assert none.recall.value == 0


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Labelled("p", "a", True)] * 20,
        [Labelled("p", " ", True)] * 10 + [Labelled("p", "b", False)] * 10,
    ],
)
def test_rows_that_teach_nothing_are_refused(rows: list[Labelled], tmp_path: Path) -> None:
    """Too few, of one label, or empty."""
    folder = tiny_model.folder(tmp_path / "encoder")
    with pytest.raises(SutureError):
        train_refusal_classifier(folder, rows, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_verdicts_that_cannot_be_kept_are_told_with_what_to_do(tmp_path: Path) -> None:
    """And a judge that fails for another reason is not taken for a file that cannot be written."""
    (tmp_path / "in the way").write_text("")
    judge = judges.Judge("key", lambda prompts, answers, got: got(0, True))
    with pytest.raises(SutureError, match="cannot be written: .*; name another file with `keep`"):
        verdicts.decided(judge, ["a"], ["b"], tmp_path / "in the way" / "file")

    def fails(*_: object) -> None:
        raise FileNotFoundError("weights")

    with pytest.raises(FileNotFoundError):
        verdicts.decided(judges.Judge("key", fails), ["a"], ["b"], tmp_path / "file")


def test_torn_lines_of_kept_verdicts_are_passed_over(tmp_path: Path) -> None:
    """A run that was killed while it wrote loses one verdict at most."""
    asked: list[int] = []

    def all_are(verdict: bool) -> judges.Judge:
        def decide(prompts: Any, answers: Any, got: Any) -> None:
            asked.append(len(prompts))
            for n in range(len(prompts)):
                got(n, verdict)

        return judges.Judge("k", decide)

    path = tmp_path / "kept"
    assert verdicts.decided(all_are(True), ["p", "q"], ["a", "b"], path) == [True, True]
    path.write_text(path.read_text()[:-8])
    again = all_are(False)
    assert verdicts.decided(again, ["p", "q"], ["a", "b"], path) == [True, False]
    assert asked == [2, 1]
    assert verdicts.decided(again, ["p", "q"], ["a", "b"], path) == [True, False]
    assert asked == [2, 1]
