"""Code blocks of the documentation's pages."""

import re


def blocks(text, language="python"):
    """Find the code blocks of a language, in order. Those of "" show commands and what a program prints."""
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for info, code in fences if info == language]


def block(text, after, language="python"):
    """Find the first code block after some words of the text."""
    return blocks(text.split(after, 1)[1], language)[0]


def n_lines(code):
    """Count the lines that are not blank."""
    return sum(bool(line.strip()) for line in code.splitlines())
