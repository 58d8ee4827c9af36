"""Writes the built-in site's dump.

python -m tasks.programs.site DIR        artifact: Posts.xml, summary.json
"""

from tasks.programs.config import SiteJob
from tasks.programs.entry import Run, main
from tasks.rlhf import shell_site


def generate(job: SiteJob, run: Run) -> None:
    """Generate the questions and answers about shell commands from the seed."""
    posts = shell_site.generate(num_questions=job.source.num_questions, seed=job.seed)
    count = shell_site.write_posts(posts, run.artifact / "Posts.xml")
    run.rewind(0)
    run.log(job.source.num_questions, job.source.num_questions)
    run.finish({"site.questions": job.source.num_questions, "site.posts": count})


if __name__ == "__main__":
    main(generate, SiteJob)
