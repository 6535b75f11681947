import os

from unsc_hf.app import build, open_run, serve

named = {name: os.environ.get(name.upper()) for name in ("original", "retrained", "dataset")}
serve(build(open_run(os.environ["RUN"], **named)), "0.0.0.0")
