"""Write the dump of the built-in site about shell commands.

python -m tasks.programs.site DIR

inputs: none
artifact: Posts.xml, summary.json
"""

from tasks.config.jobs import SiteJob
from tasks.demo_site import site
from tasks.programs.runtime.program import Run, main


def generate(job: SiteJob, run: Run) -> None:
    """Generate the questions and answers about shell commands from the seed."""
    posts = site.generate(num_questions=job.source.num_questions, seed=job.seed)
    count = site.write_posts(posts, run.artifact / "Posts.xml")
    run.rewind(0)
    run.log(job.source.num_questions, job.source.num_questions)
    run.finish({"site.questions": job.source.num_questions, "site.posts": count})


if __name__ == "__main__":
    main(generate, SiteJob)
