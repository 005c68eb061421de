"""Hostile templates are stopped: in time, memory, output and reach."""

from __future__ import annotations

import threading
import time

import pytest

from turbolm.errors import TemplateError
from turbolm.text import ChatTemplate

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
PLAIN = [{"role": "user", "content": "Hi there"}]
LOOP = "{% for i in range(99999) %}"
GROW = "{% set n = namespace(x=1) %}{% for i in range(99) %}"
HOSTILE = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": LOOP + LOOP + "{% endfor %}{% endfor %}",
    "loop filter": "{% set l = range(99999)|list %}{% for i in range(99999) if -i-1 in l %}{% endfor %}",
    "tests": "{% set l = range(99999)|list %}{{ range(99999)|map('abs')|reject('in', l)|list|length }}",
    "text times": "{{ 'a' * 10**10 }}",
    "list times": "{{ [1] * 10**9 }}",
    "power": "{{ 10 ** 10 ** 9 }}{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling +": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling ~": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "shared lists": GROW + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "shared dicts": GROW + "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
    "shared namespaces": GROW + "{% set m = namespace() %}{% set m.a = n.x %}"
    "{% set m.b = n.x %}{% set n.x = m %}{% endfor %}{{ n.x }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "output": LOOP + "x" * 1000 + "{% endfor %}",
    "hidden output": "{% set z %}" + LOOP + "x" * 1000 + "{% endfor %}{% endset %}",
    "macro output": "{% macro f() %}" + "x" * 9999 + "{% endmacro %}{% set z %}" + LOOP
    + "{{ f() }}{% endfor %}{% endset %}",
    "center": "{{ 'a'.center(10**10) }}",
    "center filter": "{{ 'a' | center(10**10) }}",
    "ljust in map": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "tabs": "{{ '\t'.expandtabs(tabsize=10**10) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent repeat": "{{ ('%(x)s' * 100000) % {'x': 'a' * 100000} }}",
    "percent filter": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format spec": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "format repeat": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "format map": "{{ ('{x}' * 100000).format_map({'x': 'a' * 100000}) }}",
    "join": "{{ ('x' * 100000).join(range(99999) | map('string')) }}",
    "join filter": "{{ range(99999) | join('x' * 100000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "indent": "{{ ('\n' * 100000) | indent(99999) }}",
    "json indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "json separator": "{{ range(9999) | list | tojson(separators=('x' * 100000, ':')) }}",
    "slices": "{% set s = 'a' * 8000000 %}" + "".join(f"{{% set a{n} = s[1:] %}}" for n in range(500)),
    "slice filter": "{{ [1] | slice(10**9) | list }}",
    "batch filter": "{{ [1] | batch(10**9, 'x') | list }}",
    "sum of lists": "{{ ([[1] * 10] * 1000) | sum(start=[]) }}",
    "reverse search": "{% set f = 'a' * 4000000 %}{{ (f ~ 'b').rfind('c' ~ f) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "round": "{{ 1.5 | round(10**9) }}",
    "compile time": "{% autoescape 'a' | center(10**10) %}{{ ('a' * 10**10) ~ '' }}{% endautoescape %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long sum": "{{ 1" + "+1" * 20000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long source": "x" * 1_000_000,
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attr": "{{ messages | attr('__class__') }}{{ messages.append(1) }}",
    "format internals": "{{ '{0.__class__.__mro__}'.format(messages) }}{{ messages.pop() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_stopped(name):
    start = time.thread_time()
    with pytest.raises(TemplateError):
        ChatTemplate(HOSTILE[name]).render(PLAIN)
    assert time.thread_time() - start < 4


def test_hostile_template_in_a_thread_leaves_others_alone():
    failures: list[str] = []

    def hostile() -> None:
        try:
            ChatTemplate(HOSTILE["nested loops"]).render(PLAIN)
        except TemplateError as error:
            failures.append(str(error))

    thread = threading.Thread(target=hostile)
    thread.start()
    expected = ChatTemplate(CHATML).render(PLAIN)
    while thread.is_alive():
        assert ChatTemplate(CHATML).render(PLAIN) == expected
    thread.join()
    assert "processor time" in failures[0]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for %}", "line 1"),
        ("{{ x", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing() }}", "nothing"),
        ("{{ messages[0].content.nope.nope }}", "nope"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | urlize }}", "urlize"),
        ("{{ 'a' + 1 }}", "TypeError"),
    ],
)
def test_template_errors_say_what_happened(source, says):
    with pytest.raises(TemplateError, match=says):
        ChatTemplate(source).render(PLAIN)


def test_templates_see_only_data():
    class Trap(dict):
        def run(self) -> str:
            return "ran"

    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages[0].run() }}").render([Trap(role="user", content="x")])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '%-5s|%03d' % ('a', 7) }}", "a    |007"),
        ("{{ '{:>4}|{x!r}'.format(1, x='y') }}", "   1|'y'"),
        ("{{ [1, 2] + [3] }}{{ (1, 2)[1:] }}{{ {'a': 1} }}", "[1, 2, 3](2,){'a': 1}"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ 'ab' * 2 }}{{ 2 ** 10 }}", "a+babab1024"),
        ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ [3, 1] | sort | list }}{{ [{'k': 1}] | map(attribute='k') | list }}", "[1, 3][1]"),
        (
            "{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}{{ x }}{% if x > 2 %}{% break %}{% endif %}{% endfor %}",
            "1123",
        ),
        ("{% macro f(a, b='x') %}{{ a ~ b }}{{ caller() }}{% endmacro %}{% call f(1) %}!{% endcall %}", "1x!"),
        ("{% set s %}a{{ 1 }}{% endset %}{{ s | upper | trim }}{% filter lower %}ABC{% endfilter %}", "A1abc"),
        ("{{ cycler('a', 'b').next() }}{{ joiner(',')() }}{{ dict(a=1).items() | list }}", "a[('a', 1)]"),
        ("{{ nothing }}|{{ none is none }}|{{ 'x' | e }}|{{ '<' | safe }}|{{ '<' | escape }}", "|True|x|<|&lt;"),
        ("{{ 'line1\nline2' | indent(2) }}|{{ 'ab' | replace('a', 'cc') }}", "line1\n  line2|ccb"),
        ("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}", "1False"),
    ],
)
def test_ordinary_jinja_works(source, expected):
    assert ChatTemplate(source).render(PLAIN) == expected
