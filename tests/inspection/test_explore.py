"""The page's server in this process: every action, wrong requests, requests of other sites, and the page itself."""

import json
import re
from http.client import HTTPConnection
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import tiny
from vae_ds import cli
from vae_ds.errors import ConfigError
from vae_ds.inspection import maps, server
from vae_ds.textvae import TextVAE

TEXTS = list(tiny.ENGLISH[:12])


@pytest.fixture
def page(served: server.Server) -> server.Server:
    return served


def ask(
    page: server.Server, path: str, body: Any = None, method: str = "POST", **headers: str
) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer."""
    connection = HTTPConnection("127.0.0.1", page.server_address[1], timeout=60)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, None if method == "GET" else sent, {"Content-Type": "application/json"} | named)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.headers.get_content_type() == "application/json" else {}


def good(page: server.Server, action: str, **words: Any) -> dict[str, Any]:
    status, found = ask(page, f"/api/{action}", words)
    assert status == 200, found
    return found


def test_the_actions_are_those_of_the_model(page: server.Server, vae: TextVAE) -> None:
    z_NL = vae.encode(TEXTS)
    status, model = ask(page, "/api/model", method="GET")
    assert (status, model["units"], model["texts"], model["name"]) == (200, 5, TEXTS, "mine")
    np.testing.assert_allclose(model["places"], maps.pca(z_NL.numpy()).xy_N2, atol=1e-3)
    found = good(page, "encode", text=TEXTS[3])
    np.testing.assert_allclose(found["z"], z_NL[3:4], atol=1e-4)
    assert found["texts"] == vae.reconstruct(TEXTS[3:4])
    np.testing.assert_allclose(found["places"][0], model["places"][3], atol=1e-3)
    assert found["log_prob"] == pytest.approx(float(vae.log_prob(TEXTS[3:4], samples=20)[0]), abs=1e-3)
    moved = z_NL[3].clone()
    moved[2] += 2
    assert good(page, "decode", z=moved.tolist())["texts"] == vae.decode(moved[None])
    drawn = good(page, "decode", z=moved.tolist(), temperature=1.5, seed=4)["texts"]
    assert drawn == vae.decode(moved[None], temperature=1.5, seed=4)
    assert good(page, "sample", n=3, seed=2)["texts"] == vae.sample(3, seed=2)
    between = good(page, "interpolate", a=TEXTS[0], b=TEXTS[1], steps=4)
    assert between["texts"] == vae.interpolate(TEXTS[0], TEXTS[1], 4)
    mixed = good(page, "mix", texts=TEXTS[:2], weights=[3, 1])
    np.testing.assert_allclose(mixed["z"][0], 0.75 * z_NL[0] + 0.25 * z_NL[1], atol=1e-4)
    near = good(page, "neighbours", z=z_NL[5].tolist(), k=3)["neighbours"]
    assert [(one["text"], one["row"]) for one in near] == [
        (one.text, one.row) for one in vae.neighbours(TEXTS[5], TEXTS, 3)
    ]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/encode", {"text": " "}, 400, "sentence 1 is empty"),
        ("/api/encode", {}, 400, "encode needs text"),
        ("/api/encode", {"texts": []}, 400, "encode takes text; found texts"),
        ("/api/decode", {"z": [1, 2]}, 400, r"shape \(1, 2\)"),
        ("/api/decode", {"z": ["a"] * 5}, 400, "decode: a wrong argument"),
        ("/api/decode", {"z": [None] * 5}, 400, "not finite|wrong argument"),
        ("/api/sample", {"n": 10_000}, 400, "1 to 50 texts; found 10000"),
        ("/api/interpolate", {"a": "x", "b": "y", "path": "zigzag"}, 400, "linear or slerp"),
        ("/api/mix", {"texts": ["a", "b"], "weights": [1, -1]}, 400, "must not be 0"),
        ("/api/neighbours", {"z": [0] * 4}, 400, "a code has 5 units"),
        ("/api/neighbours", {"z": [0]}, 400, "a code has 5 units"),
        ("/api/__init__", {}, 400, "no action __init__"),
        ("/api/encode", [1], 400, "one JSON object"),
        ("/api/encode", b"{", 400, "no JSON"),
    ],
)
def test_a_wrong_request_is_one_line(page: server.Server, path: str, body: Any, status: int, message: str) -> None:
    found = ask(page, path, body)
    assert found[0] == status
    assert re.search(message, found[1]["error"])
    assert "\n" not in found[1]["error"]


def test_a_fault_is_told_to_the_page(
    page: server.Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(self: server.Explorer) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.Explorer, "sample", out_of_memory)
    assert ask(page, "/api/sample", {}) == (500, {"error": "a fault: out of memory"})
    assert "out_of_memory" in capsys.readouterr().err  # the traceback
    monkeypatch.undo()
    assert ask(page, "/api/sample", {"n": 1})[0] == 200


def test_requests_of_other_sites_are_refused(page: server.Server, vae: TextVAE) -> None:
    """A page elsewhere could name this machine as its own, or send a form."""
    assert ask(page, "/api/model", method="GET", Host="evil.example:80")[0] == 403
    assert ask(page, "/api/sample", {}, Host="evil.example:80")[0] == 403
    assert ask(page, "/api/sample", {}, Host=f"localhost:{page.server_address[1]}")[0] == 200
    assert ask(page, "/api/sample", {}, Content_Type="text/plain")[0] == 415
    assert ask(page, "/api/sample", b" " * (1 << 20) + b"{}")[0] == 413
    assert ask(page, "/../../etc/passwd", method="GET")[0] == 404
    assert page.server_address[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"cannot listen: .*; choose another --port"):
        server.Server(page.explorer, port=page.server_address[1])
    alone = server.Explorer(vae)
    assert alone.model()["texts"] == []


def test_the_page_is_whole(page: server.Server) -> None:
    """It names no other server, asks for no action that there is not, and uses no element that it does not have."""
    connection = HTTPConnection("127.0.0.1", page.server_address[1], timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert text == resources.files("vae_ds.inspection").joinpath("page.html").read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", text) == []
    assert not re.search(r"<(?:link|img|iframe)\b|\bsrc=|@import|url\(", text)
    asked = set(re.findall(r'ask\("(\w+)"', text))
    assert asked == {"model", *server.ACTIONS}
    ids = re.findall(r'\bid="(\w+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:\$|list)\("(\w+)"', text))
    assert used <= set(ids)


def test_the_command_checks_before_it_listens(
    vae: TextVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae.save_pretrained(tmp_path / "model")
    assert cli.run(["explore", str(tmp_path / "model"), "--corpus", str(tmp_path / "no.txt")]) == 2
    assert "no.txt: no such file" in capsys.readouterr().err

    def interrupted(self: server.Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.Server, "serve_forever", interrupted)
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    words = ["explore", str(tmp_path / "model"), "--corpus", str(tmp_path / "corpus.txt"), "--port", "0"]
    assert cli.run([*words, "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/  \(Ctrl-C ends\)\n", told.out)
    assert cli.run([*words, "--device", "cpu", "--host", "0.0.0.0"]) == 0
    assert "there is no password" in capsys.readouterr().err
