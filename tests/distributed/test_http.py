"""`cofire serve` as a real process: OpenAI's answers, streams, limits, tokens, hang-ups, signals, bad input."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tokenizers import Tokenizer

from cofire.model import build
from cofire.model.huggingface import save
from cofire.serve import SamplingParameters, generate, load_tokenizer
from cofire.spec import ModelSpec, load_as
from cofire.train.tokenizer import train_tokenizer

TOKEN = "a-secret-word"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder: random weights, a tokenizer of 512 tokens."""
    home = tmp_path_factory.mktemp("served") / "tiny-model"
    save(_decoder(), home)
    texts = [f"def f{i}(x, y{i}): return x * {i} + y{i} # {i * 7919} quick brown foxes\n" for i in range(3000)]
    train_tokenizer(texts, 512).save(str(home / "tokenizer.json"))
    return home


def _decoder():
    return build(load_as(ModelSpec, "tiny", ["init_std=0.2"]), seed=0).eval()


def _start(folder, *options, **environment):
    code = "import sys; from cofire.cli.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def _ready(process) -> str:
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith("}"):
            return json.loads(text)["url"]
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def client(folder):
    process = _start(folder, "--slots", "3", "--queue", "2")
    with httpx.Client(base_url=_ready(process), timeout=60) as http:
        yield http
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, process.stderr.read()


def _metric(client, name) -> int:
    lines = client.get("/metrics").text.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"cofire_{name} "))


def _wait_idle(client):
    for _ in range(500):
        if not _metric(client, "running") + _metric(client, "waiting"):
            return
        time.sleep(0.01)
    raise AssertionError("requests still run")


def _expected(folder, prompt: str, tokens: int) -> str:
    tokenizer: Tokenizer = load_tokenizer(folder)
    return generate(_decoder(), tokenizer, [prompt], [SamplingParameters()], tokens).texts[0]


def test_a_completion_is_what_generate_gives(client, folder):
    body = {"model": "tiny-model", "prompt": "def f", "max_tokens": 20, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == _expected(folder, "def f", 20)
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(load_tokenizer(folder).encode("def f").ids)


def _stream(client, path, body):
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_stream_has_the_same_text_and_usage(client):
    body = {"prompt": ["def f", "quick"], "n": 1, "max_tokens": 20, "temperature": 0.9, "seed": 5, "top_k": 40}
    whole = client.post("/v1/completions", json=body).json()
    pieces = _stream(client, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert pieces[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c for p in pieces for c in p["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine][-1] == choice["finish_reason"]


def test_chat_answers_and_streams(client, folder):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}
    whole = client.post("/v1/chat/completions", json=body).json()
    text = whole["choices"][0]["message"]["content"]
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert text == _expected(folder, "User: Hi\n\nAssistant:", 12)
    pieces = _stream(client, "/v1/chat/completions", body)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == text
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_completion_tokens": 12}
    again = client.post("/v1/chat/completions", json=parts | {"temperature": 0}).json()
    assert again["choices"][0]["message"]["content"] == text


def test_n_choices_have_their_own_seeds(client):
    body = {"prompt": "def", "n": 3, "max_tokens": 12, "temperature": 1, "seed": 1}
    texts = [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]]
    assert len(set(texts)) == 3
    second = client.post("/v1/completions", json=body | {"n": 1, "seed": 2}).json()
    assert second["choices"][0]["text"] == texts[1]


def test_a_stop_string_ends_the_text(client):
    body = {"prompt": "def f", "max_tokens": 30, "temperature": 0}
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    choice = client.post("/v1/completions", json=body | {"stop": stop}).json()["choices"][0]
    assert choice["text"] == text[: text.find(stop)]
    assert choice["finish_reason"] == "stop"


def test_concurrent_requests_share_steps_and_keep_their_texts(client, folder):
    _wait_idle(client)
    prompts = ["def", "quick brown", "return x"]
    before = _metric(client, "steps_total")

    def ask(prompt):
        body = {"prompt": prompt, "max_tokens": 60, "temperature": 0}
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(ask, prompts))
    assert texts == [_expected(folder, prompt, 60) for prompt in prompts]
    assert _metric(client, "steps_total") - before < 3 * 60


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(client, stream):
    _wait_idle(client)
    before = _metric(client, "cancelled_total")
    body = json.dumps({"prompt": "def", "max_tokens": 250, "temperature": 0, "stream": stream})
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", body]
        connection.sendall("\r\n".join(head).encode())
        while not _metric(client, "running"):
            time.sleep(0.001)
    _wait_idle(client)
    assert _metric(client, "cancelled_total") == before + 1


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"prompt": "a", "temprature": 1}, 400, "did you mean temperature"),
        ("/v1/completions", {"prompt": "a", "logprobs": 3}, 400, "logprobs is not implemented"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature = -1"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10**6}, 400, "ask for at most"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": []}, 400, "between 1 and"),
        ("/v1/completions", {"prompt": [1, 512]}, 400, "between 0 and 511"),
        ("/v1/completions", {"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, 400, "at most 4"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/completions", [], 400, "object"),
        ("/v1/completions", {"prompt": "a", "model": "gpt-9"}, 404, "this server has 'tiny-model'"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/completions", {"prompt": "a", "n": 9}, 429, "try again"),
        ("/v1/embeddings", {"input": "a"}, 404, "there are /v1/completions"),
        ("/v1/completions", {"prompt": "a" * 5_000_000}, 413, "at most"),
    ],
)
def test_bad_requests_get_openais_error(client, path, body, status, message):
    _wait_idle(client)
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert client.get("/health").json() == {"status": "ok"}


def test_neutral_and_ignored_fields_pass(client):
    body = {"prompt": "a", "max_tokens": 1, "user": "me", "logprobs": None, "echo": False, "presence_penalty": 0.0}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_models_are_listed(client):
    entry = client.get("/v1/models").json()["data"][0]
    assert entry["id"] == "tiny-model"
    assert client.get("/v1/models/tiny-model").json() == entry
    assert client.get("/v1/models/other").status_code == 404


def test_another_hosts_name_is_refused_on_loopback(client):
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400


def test_a_token_is_asked_for_and_sigterm_finishes_what_runs(folder, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    process = _start(folder, "--host", "0.0.0.0", "--token-file", str(tmp_path / "token"))
    url = _ready(process).replace("0.0.0.0", "127.0.0.1")
    good = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/v1/models", headers=good).status_code == 200
        body = {"prompt": "def", "max_tokens": 200, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/completions", json=body, headers=good) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert process.wait(30) == 0, process.stderr.read()


def _refused(process, *words):
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words), error


def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path):
    _refused(_start(folder, "--host", "0.0.0.0"), "token")
    _refused(_start(tmp_path / "none"), "is not a folder")
    _refused(_start(folder, "--token-file", str(tmp_path / "none")), "No such file")
    _refused(_start(folder, "--slots", "1000000000"), "GB are free")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        _refused(_start(folder, "--port", port), f"port {port}", "in use")
