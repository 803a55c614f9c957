"""The command mmfast plot; of torch it needs nothing."""

import argparse
from pathlib import Path

from mmfast.console import fail, need


def plot(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="mmfast plot", description="Draws what an mmfast.Monitor wrote: cosines, conflict, weights and norms."
    )
    parser.add_argument("csv", type=Path, help="the Monitor's file, such as run.csv")
    parser.add_argument("--html", action="store_true", help="one HTML file that needs nothing else, in place of an image")
    parser.add_argument("--out", type=Path, help="where to: .png, .svg or .pdf; with --html .html. By default beside the CSV file")
    options = parser.parse_args(arguments)
    need("mmfast plot", "plot", {"matplotlib": "matplotlib"})
    from mmfast.plots import figure, page
    from mmfast.plots.log import LogError, read

    kind = ".html" if options.html else ".png"
    out = options.out or options.csv.with_suffix(kind)
    out = out if out.suffix else out.with_suffix(kind)
    if out.exists() and options.csv.exists() and out.samefile(options.csv):
        fail(f"{out} is what is read: it would be overwritten; name another file by --out")
    try:
        log = read(options.csv)
        if options.html:
            page.write(log, out, options.csv.name)
        else:
            figure.draw(log, out)
    except LogError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except ValueError as error:  # matplotlib's, of a name that ends in no kind of image
        fail(f"--out {out}: {error}")
    print(f"Written to {out}")
