"""The subject matter of the built-in site: shell tasks, how people ask for them, and which commands do them.

Words in braces are slots. ``commands[0]`` is the usual answer and the others are as good; each of ``wrong`` looks plausible and does something else;
each of ``facts`` explains the right command.
"""

from typing import NamedTuple


class ShellTask(NamedTuple):
    name: str
    questions: tuple[str, ...]
    commands: tuple[str, ...]
    wrong: tuple[str, ...]
    facts: tuple[str, ...]


SLOTS: dict[str, tuple[str, ...]] = {
    "file": tuple(
        "notes.txt report.csv data.csv access.log error.log backup.log index.html users.csv orders.csv results.txt sample.txt config.json "
        "draft.md photos.txt summary.md budget.csv thesis.md readme.md songs.txt emails.txt build.log cache.json".split()
    ),
    "dir": tuple("/var/log /etc /home/anna /srv/www /tmp /opt/app /usr/share /mnt/disk ~/work ~/music ~/mail src docs photos tests build".split()),
    "place": tuple("/backup /mnt/usb /srv/archive ~/old /media/stick target".split()),
    "ext": tuple("log txt csv py jpg png mp3 pdf".split()),
    "word": tuple("error warning timeout root failed admin cache token".split()),
    "number": tuple("2 3 5 7 10 20 50 100".split()),
    "user": tuple("anna ben carla david eva felix guest maria".split()),
    "host": tuple("server1 mars venus gateway web01 db01".split()),
    "process": tuple("firefox nginx python java chrome node sshd vim mysqld redis gimp bash".split()),
    "port": tuple("22 25 80 443 3000 3306 5432 6379 8000 8080".split()),
}

TASKS: tuple[ShellTask, ...] = (
    ShellTask(
        "list-by-size",
        (
            "How do I list the files in {dir} by size?",
            "Sort the files of {dir}, largest first?",
            "Which files in {dir} are the biggest?",
            "List {dir} sorted by size?",
            "Show the largest files of {dir} on top?",
            "Order {dir} from big to small?",
        ),
        ("ls -lS {dir}", "ls -lhS {dir}"),
        ("ls -lt {dir}", "ls -l {dir}", "du {dir}"),
        ("The -S option sorts by size.",),
    ),
    ShellTask(
        "list-by-time",
        (
            "How can I list {dir} with the newest files first?",
            "Sort the files of {dir} by date?",
            "What changed last in {dir}?",
            "List {dir} by modification time?",
            "Show the latest files of {dir} on top?",
            "Order {dir} from new to old?",
        ),
        ("ls -lt {dir}", "ls -lht {dir}"),
        ("ls -lS {dir}", "ls -lr {dir}", "date {dir}"),
        ("The -t option sorts by modification time.",),
    ),
    ShellTask(
        "find-by-ending",
        ("How do I find all .{ext} files under {dir}?", "Search {dir} for every .{ext} file?", "Where under {dir} are my .{ext} files?"),
        ('find {dir} -name "*.{ext}"', "find {dir} -name '*.{ext}'"),
        ('grep "*.{ext}" {dir}', "find {dir} -type {ext}", "ls {dir} .{ext}"),
        ("find walks the whole tree and -name matches the file name.",),
    ),
    ShellTask(
        "find-recent",
        ("How do I find files in {dir} changed in the last {number} days?", "Files under {dir} modified within {number} days?"),
        ("find {dir} -mtime -{number}", "find {dir} -type f -mtime -{number}"),
        ("find {dir} -mtime +{number}", "find {dir} -size -{number}", "ls -t {dir} {number}"),
        ("With a minus sign -mtime means less than that many days ago.",),
    ),
    ShellTask(
        "delete-ending",
        ("How do I delete all .{ext} files under {dir}?", "Remove every .{ext} file below {dir}?"),
        ('find {dir} -name "*.{ext}" -delete', 'find {dir} -type f -name "*.{ext}" -delete'),
        ("rm -rf {dir}", "rm {dir} .{ext}", 'find {dir} -delete -name "*.{ext}"'),
        ("The -delete action removes what the tests before it matched.",),
    ),
    ShellTask(
        "grep-word",
        ("How do I find lines with {word} in {file}?", "Search {file} for the word {word}?", "Show where {word} occurs in {file}?"),
        ("grep {word} {file}", "grep -n {word} {file}"),
        ("find {word} {file}", "grep {file} {word}", "cat {word} {file}"),
        ("grep prints the lines that match.",),
    ),
    ShellTask(
        "grep-count",
        ("How many lines of {file} contain {word}?", "Count the lines with {word} in {file}?"),
        ("grep -c {word} {file}", "grep {word} {file} | wc -l"),
        ("wc {word} {file}", "grep -i {word} {file}", "count {word} {file}"),
        ("The -c option counts matching lines.",),
    ),
    ShellTask(
        "grep-invert",
        ("How do I show the lines of {file} without {word}?", "Hide all lines with {word} when I read {file}?"),
        ("grep -v {word} {file}",),
        ("grep -i {word} {file}", "grep {word} {file}", "sed {word} {file}"),
        ("The -v option inverts the match.",),
    ),
    ShellTask(
        "grep-tree",
        ("How do I search for {word} in all files under {dir}?", "Which files below {dir} mention {word}?"),
        ("grep -r {word} {dir}", "grep -rn {word} {dir}"),
        ("grep {word} {dir}", "find {dir} {word}", "ls -r {dir} {word}"),
        ("The -r option searches all files below a directory.",),
    ),
    ShellTask(
        "head",
        ("How do I show the first {number} lines of {file}?", "Print only the top {number} lines of {file}?"),
        ("head -n {number} {file}", "head -{number} {file}"),
        ("tail -n {number} {file}", "cat -n {number} {file}", "first {number} {file}"),
        ("head prints the start of a file.",),
    ),
    ShellTask(
        "tail",
        ("How do I show the last {number} lines of {file}?", "Print only the final {number} lines of {file}?"),
        ("tail -n {number} {file}", "tail -{number} {file}"),
        ("head -n {number} {file}", "tail {file} {number}", "less {number} {file}"),
        ("tail prints the end of a file.",),
    ),
    ShellTask(
        "follow",
        (
            "How can I watch {file} while it grows?",
            "Follow new lines of {file} as they arrive?",
            "See {file} live?",
            "Keep printing what is added to {file}?",
            "Monitor {file} continuously?",
            "Wait for new output in {file}?",
        ),
        ("tail -f {file}", "tail -F {file}"),
        ("cat {file}", "watch {file}", "head -f {file}"),
        ("The -f option follows the file as it grows.",),
    ),
    ShellTask(
        "count-lines",
        (
            "How do I count the lines of {file}?",
            "How many lines does {file} have?",
            "Number of lines in {file}?",
            "Line count of {file}?",
            "Count every line of {file}?",
            "Is there a command for the line count of {file}?",
        ),
        ("wc -l {file}", "wc -l < {file}"),
        ("wc -c {file}", "ls -l {file}", "count {file}"),
        ("wc counts and -l means lines.",),
    ),
    ShellTask(
        "count-words",
        (
            "How do I count the words in {file}?",
            "How many words does {file} have?",
            "Word count of {file}?",
            "Number of words in {file}?",
            "Count every word of {file}?",
            "Is there a command for the word count of {file}?",
        ),
        ("wc -w {file}", "wc -w < {file}"),
        ("wc -l {file}", "wc -c {file}", "grep -w {file}"),
        ("wc counts and -w means words.",),
    ),
    ShellTask(
        "replace",
        ("How do I replace {word} by {user} in {file}?", "Change every {word} to {user} in {file}?"),
        ("sed -i 's/{word}/{user}/g' {file}", 'sed -i "s/{word}/{user}/g" {file}'),
        ("sed -i 's/{user}/{word}/g' {file}", "grep {word} {user} {file}", "tr {word} {user} {file}"),
        ("The g at the end replaces every match of a line.",),
    ),
    ShellTask(
        "sort-unique",
        (
            "How do I sort {file} and drop duplicate lines?",
            "Remove repeated lines from {file}?",
            "Get the distinct lines of {file}?",
            "Unique lines of {file} in order?",
            "Sort {file} without duplicates?",
            "Each line of {file} only once, sorted?",
        ),
        ("sort -u {file}", "sort {file} | uniq"),
        ("uniq {file}", "sort -r {file}", "cat -u {file}"),
        ("The -u option keeps one of equal lines.",),
    ),
    ShellTask(
        "column",
        ("How do I print column {number} of {file}?", "Get only field {number} of each line of {file}?"),
        ("awk '{print $" + "{number}" + "}' {file}", "cut -d' ' -f{number} {file}"),
        ("cut -c{number} {file}", "head -n {number} {file}", "column {number} {file}"),
        ("awk splits each line into fields at white space.",),
    ),
    ShellTask(
        "disk-use",
        (
            "How much space does {dir} take?",
            "What is the total size of {dir}?",
            "Size of the directory {dir}?",
            "How big is the directory {dir}?",
            "Add up the size of everything in {dir}?",
            "Disk usage of {dir}?",
        ),
        ("du -sh {dir}", "du -hs {dir}"),
        ("df -h {dir}", "ls -lh {dir}", "size {dir}"),
        ("du adds up a directory and -h prints readable units.",),
    ),
    ShellTask(
        "disk-free",
        (
            "How much free space is left for {dir}?",
            "Is the disk that holds {dir} full?",
            "See the free space of {dir}?",
            "Space left on the disk of {dir}?",
            "How full is the file system of {dir}?",
            "Available space where {dir} lies?",
        ),
        ("df -h {dir}",),
        ("du -sh {dir}", "free -h {dir}", "ls -f {dir}"),
        ("df reports the free space of a file system.",),
    ),
    ShellTask(
        "copy-tree",
        ("How do I copy {dir} with everything in it to {place}?", "Copy the whole directory {dir} into {place}?"),
        ("cp -r {dir} {place}", "cp -a {dir} {place}"),
        ("cp {dir} {place}", "mv {dir} {place}", "cp -r {place} {dir}"),
        ("The -r option copies directories and what is in them.",),
    ),
    ShellTask(
        "archive",
        (
            "How do I pack {dir} into a tar.gz?",
            "Make a compressed archive of {dir}?",
            "Create backup.tar.gz from {dir}?",
            "Compress {dir} into one archive?",
            "Bundle {dir} as a gzipped tarball?",
            "Back up {dir} into a tarball?",
        ),
        ("tar -czf backup.tar.gz {dir}", "tar czf backup.tar.gz {dir}"),
        ("tar -xzf backup.tar.gz {dir}", "zip -d {dir}", "gzip {dir}"),
        ("The letters c, z and f mean create, gzip and file.",),
    ),
    ShellTask(
        "executable",
        (
            "How do I make {file} executable?",
            "Allow everybody to run {file}?",
            "{file} says permission denied when I run it?",
            "Set the execute bit of {file}?",
            "Turn {file} into a program I can run?",
            "Run {file} as a script, permission denied?",
        ),
        ("chmod +x {file}", "chmod a+x {file}"),
        ("chmod 644 {file}", "chown +x {file}", "run {file}"),
        ("The +x adds the execute permission.",),
    ),
    ShellTask(
        "owner",
        ("How do I give {file} to the user {user}?", "Make {user} the owner of {file}?"),
        ("sudo chown {user} {file}", "chown {user} {file}"),
        ("chmod {user} {file}", "chown {file} {user}", "usermod {user} {file}"),
        ("chown changes the owner.",),
    ),
    ShellTask(
        "kill-name",
        (
            "How do I stop every {process} process?",
            "Kill all {process} processes?",
            "{process} hangs, how do I end it?",
            "End {process} by its name?",
            "Terminate every running {process}?",
            "Get rid of all {process} processes?",
        ),
        ("pkill {process}", "killall {process}"),
        ("kill {process}", "rm {process}", "ps {process}"),
        ("pkill finds processes by name.",),
    ),
    ShellTask(
        "port",
        (
            "Which program listens on port {port}?",
            "How do I find what uses port {port}?",
            "Port {port} is taken, by whom?",
            "Find the process behind port {port}?",
            "Who is using port {port}?",
            "See what is bound to port {port}?",
        ),
        ("sudo lsof -i :{port}", "lsof -i :{port}"),
        ("ping {port}", "netcat {port}", "ps -p {port}"),
        ("lsof lists open files, and sockets count as files.",),
    ),
    ShellTask(
        "upload",
        ("How do I copy {file} to {host}?", "Send {file} to my home on {host}?", "Upload {file} to {host}?"),
        ("scp {file} {host}:", "scp {file} {host}:~"),
        ("cp {file} {host}", "scp {host}: {file}", "ssh {file} {host}"),
        ("scp copies over ssh and the colon marks the remote side.",),
    ),
)


def fill(template: str, slots: dict[str, str]) -> str:
    """``template`` with its slots filled in; braces that are no slot (awk's) stay."""
    for name, value in slots.items():
        template = template.replace("{" + name + "}", value)
    return template
