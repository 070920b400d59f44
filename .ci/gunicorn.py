"""One question to the gateway under gunicorn, by the README's command; the demo is its upstream."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

QUESTION = {"model": "mom", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
COMMAND = "mom_gateway:create_runner -k aiohttp.GunicornWebWorker -w 4"
CONFIG = "models: [{name: quick, base_url: 'http://127.0.0.1:%d/demo/v1'}]\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answer(url: str) -> str:
    """What the gateway there answers, asked as soon as it is up."""
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{url}/health").close()
            break
        except OSError:
            time.sleep(0.1)
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(QUESTION).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def main() -> None:
    demo, port, tools = free_port(), free_port(), Path(sys.executable).parent
    config = Path(tempfile.mkdtemp()) / "config.yaml"
    config.write_text(CONFIG % demo, encoding="utf-8")
    assert COMMAND in Path("README.md").read_text(encoding="utf-8"), (
        "the README shows another gunicorn command"
    )
    gunicorn = [str(tools / "gunicorn"), *shlex.split(COMMAND), "-b", f"127.0.0.1:{port}"]
    running = [
        subprocess.Popen(
            [sys.executable, "mom_gateway.py", "--demo", "--port", str(demo)], stdout=subprocess.DEVNULL
        ),
        subprocess.Popen(gunicorn, env={**os.environ, "MOM_CONFIG": str(config)}),
    ]
    try:
        content = answer(f"http://127.0.0.1:{port}")
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(40) for process in running]
    assert "You asked: Why is the sky blue?" in content, content
    assert codes == [0, 0], f"exit codes {codes}"
    print("gunicorn: answered, and ended with code 0")


if __name__ == "__main__":
    main()
