"""The schema: each statement finds its index, and the plain shell can live with all of it."""

import importlib
import pkgutil
import re
import subprocess

import apsw
import pytest

import sqlspace
from sqlspace import schema

# Those that may look at every row, and why.
MAY_SCAN = {
    "browsing.SELECT_STATS": "counts every live entry; says so",
    "schema.SELECT_OBJECTS": "reads the schema itself, once an open",
    "browsing.SELECT_NEXT_DEATH": "scans the few rows that it has selected",
    "browsing.SELECT_NEXT_EXPIRY": "scans the few rows that it has selected",
}
# SQLite calls it a scan when a query with a LIMIT 1 starts at an index's end.
ONE_STEP = {
    "schema.SELECT_EXTREMES": "SCAN sqlspace_entries USING COVERING INDEX sqlspace_entries_live",
    "upkeep.SELECT_TOP": "SCAN sqlspace_entries",
}
STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH|REPLACE)\b")


def statements():
    """Every module-level UPPER_CASE str of SQL in the package, by module and name."""
    found = {}
    for module in pkgutil.iter_modules(sqlspace.__path__):
        if module.name in ("__main__", "cli", "checkup"):  # `sqlspace check` reads the whole file
            continue
        try:
            imported = importlib.import_module(f"sqlspace.{module.name}")
        except ModuleNotFoundError as error:  # one of an extra that isn't installed
            assert not (error.name or "").startswith("sqlspace"), error
            continue
        for name, value in vars(imported).items():
            if name.isupper() and isinstance(value, str) and STATEMENT.match(value):
                found[f"{module.name}.{name}"] = value
    return found


STATEMENTS = statements()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store with some of everything."""
    path = str(tmp_path_factory.mktemp("schema") / "queue.db")
    with sqlspace.open(path) as store:
        for number in range(30):
            store.push_many(f"key{number}", [b"x"] * 10)
        for number in range(30):
            store.pull_many(f"key{number}", 5)
    return path


def ensure_direct(name, plan):
    """No line of a plan scans a table or an index, but for those that may."""
    for line in plan:
        assert "AUTOMATIC" not in line, (name, plan)
        if name not in MAY_SCAN and line not in (ONE_STEP.get(name), "SCAN CONSTANT ROW"):
            assert not line.startswith("SCAN"), (name, plan)
            assert "sqlite_autoindex" not in line or "key=?" in line, (name, plan)


def test_the_statements_are_found():
    """The collection would be of no use if it were empty; the exceptions must exist."""
    assert len(STATEMENTS) > 20
    modules = {name.partition(".")[0] for name in STATEMENTS}
    assert {"entries", "browsing", "upkeep", "database", "schema"} <= modules
    assert set(MAY_SCAN) | set(ONE_STEP) <= set(STATEMENTS)


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_goes_by_an_index_and_never_sorts(path, name, analyzed):
    """However the store grows, no verb looks at more rows; an ANALYZE doesn't change that."""
    database = apsw.Connection(":memory:")
    with database.backup("main", apsw.Connection(path), "main") as copying:
        copying.step()
    database.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    if analyzed:
        database.execute("ANALYZE")
    rows = database.execute(
        f"EXPLAIN QUERY PLAN {STATEMENTS[name]}", can_bind_none(STATEMENTS[name])
    )
    plan = [detail for *_, detail in rows]
    ensure_direct(name, plan)
    assert "TEMP B-TREE" not in " ".join(plan), plan
    database.close()


def can_bind_none(sql):
    """As many NULLs as the statement has parameters."""
    numbers = [int(number or 1) for number in re.findall(r"\?(\d*)", sql)]
    count = max(numbers) if re.search(r"\?\d", sql) else len(numbers)
    return (None,) * count


def test_every_statement_goes_by_an_index_in_the_plain_shell_too(path):
    """What people try by hand in SQLite 3.40, whose planner is another; there it may sort."""
    script = "".join(
        f".print name:{name}\nEXPLAIN QUERY PLAN {sql.strip()};\n"
        for name, sql in STATEMENTS.items()
    )
    done = subprocess.run(
        ["sqlite3", "-bail", path], input=script, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    plans = {}
    for line in done.stdout.splitlines():
        if line.startswith("name:"):
            plans[line.removeprefix("name:")] = plan = []
        elif line != "QUERY PLAN":
            plan.append(line.lstrip(" |-`"))
    assert set(plans) == set(STATEMENTS)
    for name, plan in plans.items():
        ensure_direct(name, plan)


class Steps:
    """Counts what SQLite does for a store: steps of its virtual machine, and sorts."""

    def __init__(self, store):
        session = store._database._session
        self.steps = self.sorts = 0
        for connection in (session.connection, session.open_reader(store._database.options)):
            connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, self.count)

    def count(self, event):
        self.steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]
        self.sorts += event["stmt_status"]["SQLITE_STMTSTATUS_SORT"]

    def of(self, call):
        self.steps = self.sorts = 0
        call()
        assert self.sorts == 0
        return self.steps


def in_transaction(store):
    with store.transaction() as together:
        together.push("mine", b"x", dedupe="b")
        together.pullp("mine")
        together.peek("mine")
        together.len("mine")


CALLS = {
    "push": lambda store: store.push("mine", b"x"),
    "push_many": lambda store: store.push_many("mine", [b"x", b"y"]),
    "pullp": lambda store: store.pullp("mine"),
    "pullp of none": lambda store: store.pullp("none"),
    "pull": lambda store: store.pull("mine", 0),
    "pull_many": lambda store: store.pull_many("mine", 2),
    "pull_any": lambda store: store.pull_any(["none", "mine"], 0),
    "peek": lambda store: store.peek("mine"),
    "len": lambda store: store.len("mine"),
    "wait": lambda store: store.wait("mine", 0),
    "wait_empty": lambda store: store.wait_empty("none", 0),
    "get": lambda store: store.get("mine", 1),
    "entries": lambda store: list(store.entries("mine")),
    "remove": lambda store: store.remove("mine", 4),
    "claim and ack": lambda store: store.claim("mine", 0).ack(),
    "claim and nack": lambda store: store.claimp(["none", "mine"]).nack(),
    "claim and nack later": lambda store: store.claimp("mine").nack(1000),
    "claim for the last time": lambda store: store.claimp("mine", max_attempts=1).nack(),
    "claim in order": lambda store: store.claimp("mine", ordered=True),
    "claim and extend": lambda store: store.claimp("mine").extend(50),
    "claim_many and ack_many": lambda store: store.ack_many(store.claim_many("mine", 2)),
    "requeue": lambda store: store.requeue("mine"),
    "push with a ttl": lambda store: store.push("mine", b"x", ttl=1000),
    "push with a delay": lambda store: store.push("mine", b"x", delay=1000),
    "push with a name": lambda store: store.push("mine", b"x", dedupe="a"),
    "push of a known name": lambda store: store.push("mine", b"x", dedupe="a"),
    "push with room": lambda store: store.push("mine", b"x", max_len=1000),
    "push_many with a ttl": lambda store: store.push_many("mine", [b"x"], ttl=1000),
    "len of all states": lambda store: store.len("mine"),
    "transaction": in_transaction,
    "put": lambda store: store.put("mine", b"x", ttl=1000),
    "clear": lambda store: store.clear("mine"),
}


def test_no_verb_of_a_key_does_more_work_when_other_keys_and_the_history_grow(tmp_path):
    """Counted, not timed: what a verb costs depends on its own key's entries only."""
    costs = []
    for others in (10, 3000):
        with sqlspace.open(tmp_path / f"{others}.db", sync=False) as store:
            store.push_many("mine", [b"%d" % number for number in range(30)])
            for name in ("lower", "much", "upper"):
                store.push_many(name, [b"x"] * others * 2)
                assert len(store.pull_many(name, others)) == others
                store.push_many(name, [b"x"] * others, ttl=9000, delay=5000)
                assert len(store.claim_many(name, others // 2, max_attempts=1)) == others // 2
            count = Steps(store)
            costs.append(
                {name: count.of(lambda call=call: call(store)) for name, call in CALLS.items()}
            )
    small, large = costs
    assert all(steps > 0 for steps in small.values())
    for name, steps in small.items():
        # A tree that is deeper, a page that is split: a little more is no scan.
        assert large[name] <= steps * 1.2 + 20, (name, steps, large[name])


# -- the names, and the plain shell


def test_everything_in_the_file_is_named_sqlspace(path):
    """So that the tables can live in an application's own database."""
    database = apsw.Connection(path)
    rows = database.execute("SELECT type, name, tbl_name FROM sqlite_schema").fetchall()
    database.close()
    assert len(rows) > 10
    for _, name, table in rows:
        assert table.startswith("sqlspace_")
        assert name.startswith(("sqlspace_", "sqlite_autoindex_sqlspace_"))
    found = {(kind, name) for kind, name, _ in rows}
    assert {
        ("table", "sqlspace_entries"),
        ("table", "sqlspace_schema"),
        ("view", "sqlspace_outbox"),
        ("view", "sqlspace_keys"),
        ("view", "sqlspace_live"),
        ("view", "sqlspace_tombstones"),
    } <= found


def test_ddl_stands_in_the_migrations_only():
    """They are the only place, so what they make is what there is."""
    for name, sql in STATEMENTS.items():
        assert not re.search(r"\b(CREATE|ALTER|DROP)\b", sql), name


def test_the_plain_shell_makes_the_same_schema_from_the_migrations(tmp_path):
    """SQLite 3.40 reads the DDL, and stores it as apsw's does; a Store then opens the file."""
    path = str(tmp_path / "shell.db")
    script = "".join(migration.sql for migration in schema.migrations())
    for migration in schema.migrations():
        first = "'" + "a" * 32 + "', 0" if migration.version == 1 else "NULL, NULL"
        script += (
            f"INSERT INTO sqlspace_schema VALUES "
            f"({migration.version}, '{migration.name}', 1, {first});\n"
        )
    done = subprocess.run(
        ["sqlite3", "-bail", path],
        input=script + "INSERT INTO sqlspace_outbox VALUES ('mail', 'hi');",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == done.stdout == ""
    with sqlspace.open(path) as store:
        assert store.pull("mail", 0) == b"hi"
        assert store.push("mail", b"x") == 2


VIEWS = (
    "SELECT key, ready, leased, delayed, bytes FROM sqlspace_keys;"
    "SELECT seq, key, state, payload FROM sqlspace_live ORDER BY seq;"
    "SELECT seq, key, outcome FROM sqlspace_tombstones;"
    "SELECT key, payload FROM sqlspace_outbox ORDER BY payload;"
    "PRAGMA integrity_check;"
)


def test_the_plain_shell_reads_what_a_store_wrote_while_it_is_open(tmp_path):
    """Every view of the contract answers, and the file is sound."""
    with sqlspace.open(tmp_path / "queue.db") as store:
        store.push_many("mail", [b"one", b"two", b"three"])
        store.pull("mail")
        done = subprocess.run(
            [
                "sqlite3",
                store.path,
                VIEWS,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.splitlines() == [
        "mail|2|0|0|8",
        "2|mail|ready|two",
        "3|mail|ready|three",
        "1|mail|taken",
        "mail|three",
        "mail|two",
        "ok",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("'', 'x'", "1 to 1024 bytes"),
        (f"'{'k' * 1025}', 'x'", "1 to 1024 bytes"),
        ("NULL, 'x'", "key must be TEXT"),
        ("7, 'x'", "key must be TEXT"),
        ("x'6b', 'x'", "key must be TEXT"),
        ("'a' || char(0) || 'b', 'x'", "NUL"),
        ("CAST(x'ff' AS TEXT), 'x'", "valid UTF-8"),
        ("CAST(x'eda080' AS TEXT), 'x'", "valid UTF-8"),
        ("CAST(x'c0af' AS TEXT), 'x'", "valid UTF-8"),
        ("CAST(x'f4908080' AS TEXT), 'x'", "valid UTF-8"),
        ("CAST(x'e282' AS TEXT), 'x'", "valid UTF-8"),
        ("'k', NULL", "payload must not be NULL"),
    ],
)
@pytest.mark.parametrize("verb", ["INSERT", "INSERT OR IGNORE", "REPLACE"])
def test_the_outbox_refuses_what_push_would_refuse(tmp_path, values, words, verb):
    """A bad key or a NULL payload aborts, also where the statement says IGNORE."""
    sqlspace.open(tmp_path / "queue.db").close()
    sql = f"{verb} INTO sqlspace_outbox (key, payload) VALUES ({values})"
    done = subprocess.run(
        ["sqlite3", tmp_path / "queue.db", sql], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert words in done.stderr
    with sqlspace.open(tmp_path / "queue.db") as store:
        assert store.keys() == []
        assert store.push("mail", b"x") == 1


def test_the_outbox_takes_every_key_that_push_takes(tmp_path):
    """Of 1 byte and of 1,024, of each length a character has in UTF-8; payloads of any type."""
    keys = [
        "k",
        "k" * 1024,
        "é" * 512,
        "𝄞" * 256,
        "\x7f",
        "\ufffd",
        "\ufffe\uffff" * 170,
        "\U0010ffff\U0001fffe",
        "it''s",
    ]
    values = ", ".join(f"('{key}', 'x')" for key in keys)
    sql = f"INSERT INTO sqlspace_outbox VALUES {values}, ('types', 7), ('types', x'00ff')"
    sqlspace.open(tmp_path / "queue.db").close()
    subprocess.run(["sqlite3", tmp_path / "queue.db"], input=sql.encode(), check=True)
    with sqlspace.open(tmp_path / "queue.db") as store:
        assert store.keys() == sorted([key.replace("''", "'") for key in keys] + ["types"])
        assert store.pull_many("types", 5) == [b"7", b"\0\xff"]
