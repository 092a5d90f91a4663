#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox"]
# ///
"""The test suite in environments of its own: `nox -l` lists them; the Makefile has everything else.

`nox -s tests` runs it on every interpreter that can be found here, `nox -s oldest` with constraints-oldest.txt.
"""

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
VERSIONS = ["3.11", "3.12", "3.13", "3.14", "3.14t"]


@nox.session(python=VERSIONS)
def tests(session: nox.Session) -> None:
    """The tests, on the installed package, with the tested versions of the dependencies."""
    _tests(session, "constraints.txt", ".[test]")


@nox.session(python=VERSIONS[0], default=False)
def oldest(session: nox.Session) -> None:
    """The tests with the oldest versions of the dependencies that work."""
    _tests(session, "constraints-oldest.txt", ".[test]")


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """What `make lint` runs."""
    session.install("-c", "constraints.txt", "ruff", "mypy", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


def _tests(session: nox.Session, constraints: str, package: str) -> None:
    session.install("-c", constraints, package, env={"FMN_REQUIRE_EXT": "1"})
    session.chdir("tests")
    session.run("python", "-m", "pytest", *session.posargs)


if __name__ == "__main__":
    nox.main()
