"""`vae-ds explore`: a local page to use a model with. One HTML file, no resources from elsewhere, the standard library.

The page asks for JSON: GET /api/model, and POST /api/NAME with an object, whose keys are the arguments of the method
`NAME` of `Explorer`. Errors of the user are {"error": ...} with the status 400.

Shapes: N texts, L latent units.
"""

import inspect
import json
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

import numpy as np

from vae_ds.errors import ConfigError, DataError, UserError
from vae_ds.inspection.maps import Principal
from vae_ds.inspection.targets import Values
from vae_ds.latents import between
from vae_ds.textvae import TextVAE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BYTES = 1 << 20  # of a request
MOST = 50  # texts of a request
# The page has everything in it, and may ask this server only.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
ACTIONS = ("encode", "decode", "sample", "interpolate", "mix", "neighbours")


class Explorer:
    """What the page can ask for. One request at a time uses the model."""

    def __init__(self, vae: TextVAE, texts: Sequence[str] = (), values: Values | None = None, name: str = "") -> None:
        """texts: the corpus of the map and of the neighbours; `values` colour them. Raises DataError for one text."""
        self._vae, self._texts, self._name, self._lock = vae, list(texts), name, threading.Lock()
        self._values = None if values is None else list(values)
        self._z_NL = np.zeros((0, vae.latent_dim), np.float32)
        self._plane: Principal | None = None
        if self._texts:
            self._z_NL = vae.encode(self._texts).numpy()
            self._plane = Principal.of(self._z_NL)

    def model(self) -> dict[str, Any]:
        """The model, and the map: texts with their places and values."""
        places = [] if self._plane is None else self._plane.place(self._z_NL).round(4).tolist()
        scale_L = self._z_NL.std(0) if len(self._z_NL) else np.ones(self._vae.latent_dim)
        return {
            "name": self._name,
            "units": self._vae.latent_dim,
            "fingerprint": self._vae.fingerprint,
            "device": str(self._vae.device),
            "scale": scale_L.round(4).tolist(),
            "texts": self._texts,
            "places": places,
            "values": self._values,
        }

    def ask(self, name: str, words: dict[str, Any]) -> dict[str, Any]:
        """The answer of an action. Raises DataError for an unknown action or wrong arguments."""
        if name not in ACTIONS:
            raise DataError(f"no action {name}; the actions are {', '.join(ACTIONS)}")
        action = getattr(self, name)
        known = inspect.signature(action).parameters
        if unknown := set(words) - set(known):
            raise DataError(f"{name} takes {', '.join(known)}; found {', '.join(sorted(unknown))}")
        missing = [key for key, one in known.items() if one.default is inspect.Parameter.empty and key not in words]
        if missing:
            raise DataError(f"{name} needs {', '.join(missing)}")
        with self._lock:
            try:
                answer: dict[str, Any] = action(**words)
            except (TypeError, ValueError) as error:
                raise DataError(f"{name}: a wrong argument: {error}") from None
        return answer

    def encode(self, text: str) -> dict[str, Any]:
        """The code of a text, its text, its place on the map, and its log probability."""
        z_1L = self._vae.encode([text]).numpy()
        return self._shown(z_1L) | {"log_prob": float(self._vae.log_prob([text], samples=20)[0])}

    def decode(self, z: list[float], temperature: float | None = None, seed: int = 0) -> dict[str, Any]:
        """The text of a code, and its place."""
        return self._shown(np.array([z], np.float32), temperature=temperature, seed=seed)

    def sample(self, n: int = 8, seed: int = 0, temperature: float | None = None) -> dict[str, Any]:
        """Texts from z ~ N(0, I)."""
        return {"texts": self._vae.sample(_few(n), seed=seed, temperature=temperature)}

    def interpolate(self, a: str, b: str, steps: int = 7, path: str = "linear") -> dict[str, Any]:
        """Texts between two texts, and their places."""
        za_L, zb_L = self._vae.encode([a, b])
        return self._shown(between(za_L, zb_L, _few(steps), path).numpy())

    def mix(self, texts: list[str], weights: list[float]) -> dict[str, Any]:
        """The text of the weighted mean of the codes of some texts."""
        if len(texts) != len(weights) or not _few(len(texts)):
            raise DataError(f"mix needs a weight for each text; found {len(texts)} texts and {len(weights)} weights")
        total = float(np.sum(weights))
        if not np.isfinite(total) or abs(total) < 1e-9:
            raise DataError(f"the sum of the weights must not be 0; found {total:g}")
        return self._shown((np.array(weights) / total @ self._vae.encode(texts).numpy())[None].astype(np.float32))

    def neighbours(self, z: list[float], k: int = 8) -> dict[str, Any]:
        """The texts of the corpus with the nearest codes."""
        if not self._texts:
            raise DataError("there is no corpus; start `vae-ds explore` with --corpus FILE")
        if np.shape(z) != (self._vae.latent_dim,):
            raise DataError(f"a code has {self._vae.latent_dim} units; found the shape {np.shape(z)}")
        distance_N = np.linalg.norm(self._z_NL - np.array(z, np.float32), axis=1)
        rows = np.argsort(distance_N, kind="stable")[: _few(k)].tolist()
        found = [{"text": self._texts[row], "row": row, "distance": float(distance_N[row])} for row in rows]
        return {"neighbours": found}

    def _shown(self, z_NL: np.ndarray, **decoding: Any) -> dict[str, Any]:
        texts = self._vae.decode(z_NL, **decoding)
        places = None if self._plane is None else self._plane.place(z_NL).round(4).tolist()
        return {"z": z_NL.astype(np.float64).round(5).tolist(), "texts": texts, "places": places}


class Server(ThreadingHTTPServer):
    """Serves an `Explorer` at `url`."""

    daemon_threads = True

    def __init__(self, explorer: Explorer, host: str = "127.0.0.1", port: int = 0) -> None:
        """port: 0 for any free one. Raises ConfigError if it is in use, or the host is unknown."""
        self.explorer = explorer
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{host}:{port}: cannot listen: {reason}; choose another --port or --host") from None
        self.is_local = host in LOOPBACK
        self.url = f"http://{host}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that is gone is no fault. Anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request. Requests of other pages in the same browser are refused."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vae_ds", ""
    timeout = 60

    def do_GET(self) -> None:  # the name that http.server calls
        if not self._is_own():
            return
        if self.path == "/":
            page = resources.files("vae_ds.inspection").joinpath("page.html").read_bytes()
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        elif self.path == "/api/model":
            self._json(HTTPStatus.OK, self.server.explorer.model())
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": f"nothing at {self.path}"})

    def do_POST(self) -> None:
        if not self._is_own():
            return
        # A page of another site can send a form, but no JSON without a question that this server does not answer.
        if self.headers.get_content_type() != "application/json":
            self._json(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "send application/json"}, is_last=True)
            return
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > LARGEST_BYTES:
            error = f"a request has at most {LARGEST_BYTES:,} bytes"
            self._json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": error}, is_last=True)
            return
        begun = time.monotonic()
        try:
            words = json.loads(self.rfile.read(int(size)))
            if not isinstance(words, dict):
                raise DataError("send one JSON object")
            answer = self.server.explorer.ask(self.path.removeprefix("/api/"), words)
        except UserError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except ValueError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"no JSON: {error}"})
        except RuntimeError as error:  # of PyTorch, such as too little memory
            traceback.print_exc()
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"a fault: {error}"})
        else:
            self._json(HTTPStatus.OK, answer | {"duration_s": round(time.monotonic() - begun, 4)})

    def log_message(self, format: str, *args: Any) -> None:
        """The requests of one user are no news."""

    def _is_own(self) -> bool:
        """Whether the request names this server: the name of a foreign page may point to this machine, too."""
        host = self.headers.get("Host", "").rpartition(":")[0].strip("[]")
        if self.server.is_local and host not in LOOPBACK:
            self._json(HTTPStatus.FORBIDDEN, {"error": "open the page under 127.0.0.1 or localhost"}, is_last=True)
            return False
        return True

    def _json(self, status: HTTPStatus, answer: dict[str, Any], is_last: bool = False) -> None:
        if is_last:
            self.close_connection = True
            # To close with a body unread would reset the connection, and the reader could lose the answer.
            size = self.headers.get("Content-Length", "")
            self.rfile.read(min(int(size), 2 * LARGEST_BYTES) if size.isdecimal() else 0)
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _few(count: int) -> int:
    if not 1 <= count <= MOST:
        raise DataError(f"a request has 1 to {MOST} texts; found {count}")
    return count
