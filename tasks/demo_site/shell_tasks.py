"""Define the shell tasks of the built-in site: the questions, and the right and wrong commands.

Words in braces are slots. ``commands[0]`` is the usual answer and the others are equally good; each of
``wrong`` looks plausible and does something else; each of ``facts`` explains the right command.
"""

from typing import NamedTuple


class ShellTask(NamedTuple):
    """A task with its questions, commands and explanations."""

    name: str
    questions: tuple[str, ...]
    commands: tuple[str, ...]
    wrong: tuple[str, ...]
    facts: tuple[str, ...]


SLOTS: dict[str, tuple[str, ...]] = {
    "file": tuple(
        "notes.txt report.csv data.csv access.log error.log index.html users.csv config.json draft.md "
        "photos.txt readme.md cache.json".split()
    ),
    "dir": tuple(
        "/var/log /etc /home/anna /srv/www /tmp /opt/app ~/work ~/music src docs tests build".split()
    ),
    "place": tuple("/backup /mnt/usb /srv/archive ~/old /media/stick target shared /data".split()),
    "ext": tuple("log txt py jpg png pdf html bak".split()),
    "word": tuple("warning timeout root failed admin login token debug".split()),
    "number": tuple("2 3 5 7 10 20 50 100".split()),
    "user": tuple("anna ben carla david eva felix maria oscar".split()),
    "host": tuple("server1 mars venus gateway web01 db01 mail pluto".split()),
}

TASKS: tuple[ShellTask, ...] = (
    ShellTask(
        "find-by-ending",
        (
            "How do I find all .{ext} files under {dir}?",
            "Search {dir} for every .{ext} file?",
            "Where under {dir} are my .{ext} files?",
            "List the .{ext} files anywhere below {dir}?",
        ),
        ('find {dir} -name "*.{ext}"', "find {dir} -name '*.{ext}'"),
        ('grep "*.{ext}" {dir}', "find {dir} -type {ext}", "ls {dir} .{ext}"),
        ("find walks the whole tree and -name matches the file name.",),
    ),
    ShellTask(
        "delete-ending",
        (
            "How do I delete all .{ext} files under {dir}?",
            "Remove every .{ext} file below {dir}?",
            "Clean {dir} of its .{ext} files?",
            "Get rid of the .{ext} files in {dir} and below?",
        ),
        ('find {dir} -name "*.{ext}" -delete', 'find {dir} -type f -name "*.{ext}" -delete'),
        ("rm -rf {dir}", "rm {dir} .{ext}", 'find {dir} -delete -name "*.{ext}"'),
        ("The -delete action removes what the tests before it matched.",),
    ),
    ShellTask(
        "grep-word",
        (
            "How do I find lines with {word} in {file}?",
            "Search {file} for the word {word}?",
            "Show where {word} occurs in {file}?",
            "Which lines of {file} contain {word}?",
        ),
        ("grep {word} {file}", "grep -n {word} {file}"),
        ("find {word} {file}", "grep {file} {word}", "grep -v {word} {file}"),
        ("grep prints the lines that match.",),
    ),
    ShellTask(
        "grep-count",
        (
            "How many lines of {file} contain {word}?",
            "Count the lines with {word} in {file}?",
            "Number of lines in {file} that mention {word}?",
            "How often does a line of {file} say {word}?",
        ),
        ("grep -c {word} {file}", "grep {word} {file} | wc -l"),
        ("wc {word} {file}", "grep -i {word} {file}", "grep -v {word} {file}"),
        ("The -c option counts matching lines.",),
    ),
    ShellTask(
        "grep-invert",
        (
            "How do I show the lines of {file} without {word}?",
            "Hide all lines with {word} when I read {file}?",
            "Leave out {word} when I print {file}?",
            "Read {file} but skip the lines that say {word}?",
        ),
        ("grep -v {word} {file}",),
        ("grep -i {word} {file}", "grep {word} {file}", "sed {word} {file}"),
        ("The -v option inverts the match.",),
    ),
    ShellTask(
        "head",
        (
            "How do I show the first {number} lines of {file}?",
            "Print only the top {number} lines of {file}?",
            "See where {file} starts, {number} lines of it?",
            "I need the beginning of {file}, {number} lines of it?",
        ),
        ("head -n {number} {file}", "head -{number} {file}"),
        ("tail -n {number} {file}", "tail -{number} {file}", "cat -n {number} {file}"),
        ("head prints the start of a file.",),
    ),
    ShellTask(
        "tail",
        (
            "How do I show the last {number} lines of {file}?",
            "Print only the final {number} lines of {file}?",
            "See how {file} ends, {number} lines of it?",
            "I need the end of {file}, {number} lines of it?",
        ),
        ("tail -n {number} {file}", "tail -{number} {file}"),
        ("head -n {number} {file}", "head -{number} {file}", "tail {file} {number}"),
        ("tail prints the end of a file.",),
    ),
    ShellTask(
        "copy-tree",
        (
            "How do I copy {dir} with everything in it to {place}?",
            "Copy the whole directory {dir} into {place}?",
            "Duplicate all of {dir} in {place}?",
            "Back up {dir} and what is below it to {place}?",
        ),
        ("cp -r {dir} {place}", "cp -a {dir} {place}"),
        ("cp {dir} {place}", "mv {dir} {place}", "cp -r {place} {dir}"),
        ("The -r option copies directories and what is in them.",),
    ),
    ShellTask(
        "owner",
        (
            "How do I give {file} to the user {user}?",
            "Make {user} the owner of {file}?",
            "{file} should belong to {user}, what do I type?",
            "Change the owner of {file} to {user}?",
        ),
        ("sudo chown {user} {file}", "chown {user} {file}"),
        ("chmod {user} {file}", "chown {file} {user}", "usermod {user} {file}"),
        ("chown changes the owner.",),
    ),
    ShellTask(
        "upload",
        (
            "How do I copy {file} to {host}?",
            "Send {file} to my home on {host}?",
            "Upload {file} to {host}?",
            "Get {file} from here to {host} over the network?",
        ),
        ("scp {file} {host}:", "scp {file} {host}:~"),
        ("cp {file} {host}", "scp {host}: {file}", "ssh {file} {host}"),
        ("scp copies over ssh and the colon marks the remote side.",),
    ),
)


def fill_slots(template: str, slots: dict[str, str]) -> str:
    """Return ``template`` with its slots filled in; other braces (awk's) are kept."""
    for name, value in slots.items():
        template = template.replace("{" + name + "}", value)
    return template
