"""What a hostile template may not do: reach the machine, change what it is given, or run on."""

import time

import jinja2
import pytest

from alignjax.core.errors import UserError
from alignjax.text import ChatTemplate, vocab_tokenizer
from alignjax.text.sandbox import MAX_STEPS, Sandbox


def render(source, **values):
    sandbox = Sandbox()
    sandbox.start()
    return sandbox.from_string(source).render(**values)


def doubled(start, operator):
    return (
        f"{{% set n = namespace(x={start}) %}}"
        f"{{% for i in range(99) %}}{{% set n.x = n.x {operator} n.x %}}{{% endfor %}}"
    )


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive": "{% for x in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "doubled_text": doubled("'a'", "~"),
    "doubled_list": doubled("[1]", "+"),
    "doubled_argument": "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('aaaaaaaa') }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times_list": "{{ 10 ** 10 * [1] }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "format": "{{ '%999999999999d' % 1 }}",
    "format_star": "{{ '%*d' % (999999999999, 1) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "range": "{% for x in range(10 ** 7) %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_run_on_is_stopped_within_seconds(name):
    start = time.perf_counter()
    tokenizer = vocab_tokenizer(["a", "<eos>"], bos=None, pad="<eos>")
    with pytest.raises(UserError, match=r"^chat template: .*\(roles: user\)$"):
        ChatTemplate(tokenizer, ENDLESS[name]).render([{"role": "user", "content": ""}])
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__.os }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ raise_exception.__globals__.os.system('x') }}",
        "{{ strftime_now.__globals__.json }}",
        "{{ self.__init__.__globals__.os }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.x }}",
        "{{ open('/etc/passwd') }}",
    ],
)
def test_what_reaches_for_the_machine_or_changes_messages_is_refused(source):
    messages = [{"role": "user"}]
    with pytest.raises((jinja2.TemplateError, TypeError)):
        render(source, messages=messages)
    assert messages == [{"role": "user"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError: too many"),
        ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "RecursionError"),
    ],
)
def test_what_cannot_be_compiled_is_a_fault_of_the_template(source, message):
    tokenizer = vocab_tokenizer(["a", "<eos>"], bos=None, pad="<eos>")
    with pytest.raises(UserError, match=f"^chat template: {message}"):
        ChatTemplate(tokenizer, source)


def test_loops_are_as_they_were():
    source = (
        "{% for x in values if x != 'b' %}{{ loop.index }}{{ x }}{{ loop.length }}{{ loop.last }};"
        "{% else %}none{% endfor %}{% for k, v in {'k': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% for x in nothing %}{% else %}!{% endfor %}"
        "{% for x in '12' %}{{ loop.nextitem }}{% endfor %}"
    )  # fmt: skip
    assert render(source, values=iter("abc")) == "1a2False;2c2True;k1!2"
    assert render(
        "{% for x in [1, [2]] recursive %}{{ loop([]) if x == 1 else x }}{% endfor %}"
    ) == ("[2]")


def test_arithmetic_is_as_it_was():
    source = "{{ 2 ** 10 }} {{ 'ab' * 3 }} {{ '%03d' % 7 }} {{ 1 + 2 }} {{ [1] + [2] }} {{ 7 % 4 }}"
    assert render(source) == "1024 ababab 007 3 [1, 2] 3"


def test_the_count_begins_anew_with_each_rendering():
    tokenizer = vocab_tokenizer(["a", "<eos>"], bos=None, pad="<eos>")
    assert 2 * 90_000 < MAX_STEPS < 4 * 90_000
    template = ChatTemplate(tokenizer, "{% for x in range(90000) %}{% endfor %}" * 2 + "done")
    for _ in range(3):
        assert template.render([]) == "done"
