#![allow(clippy::unwrap_used)]

use super::*;

const TINY: &str = r#"name = "tiny"
description = "nothing much"
packages = ["busybox"]

[base]
distribution = "debian"
suite = "bookworm"

[user]
name = "user"
uid = 1000
gid = 1000
"#;

fn error(from: &str, to: &str) -> (usize, usize, String) {
    assert!(TINY.contains(from));
    let error = Recipe::parse(&TINY.replace(from, to)).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    (error.line, error.column, error.reason)
}

#[test]
fn a_small_recipe_has_defaults() {
    let recipe = Recipe::parse(TINY).unwrap();
    assert_eq!(recipe.config().user.home(), "/home/user");
    assert_eq!(recipe.config().defaults, Defaults::default());
    assert_eq!(recipe.base.components, ["main"]);
    assert!(recipe.config().session.is_none());
}

#[test]
fn errors_say_where() {
    let (line, column, reason) = error("suite =", "siute =");
    assert_eq!((line, column), (7, 1), "{reason}");
    assert!(reason.contains("siute"), "{reason}");
    let (line, column, reason) = error("[\"busybox\"]", "[\"busybox\", \"--help\"]");
    assert_eq!((line, column), (3, 24), "{reason}");
    assert!(reason.contains("--help"), "{reason}");
    assert_eq!(error("\"tiny\"", "\"../tiny\"").0, 1);
    assert_eq!(error("uid = 1000", "uid = 0").0, 9);
    assert_eq!(error("gid = 1000", "gid = \"x\"").0, 12);
    assert_eq!(error("\"debian\"", "\"beos\"").0, 6);
    assert_eq!(error("[user]", "[[user").0, 9);
}

#[test]
fn files_stay_inside() {
    for bad in ["etc/x", "/", "/etc/../x", "/etc//x", "/etc/./x", "/etc/"] {
        let text = format!("{TINY}[[files]]\npath = \"{bad}\"\ncontent = \"\"\n");
        assert!(Recipe::parse(&text).is_err(), "{bad}");
    }
    for (mode, owner) in [("0888", "0:0"), ("-1", "0:0"), ("10000", "0:0"), ("644", "root"), ("644", "65536:0")] {
        let text = format!("{TINY}[[files]]\npath = \"/x\"\ncontent = \"\"\nmode = \"{mode}\"\nowner = \"{owner}\"\n");
        assert!(Recipe::parse(&text).is_err(), "{mode} {owner}");
    }
    let text = format!("{TINY}[[files]]\npath = \"/x\"\ncontent = \"a\"\nmode = \"4755\"\nowner = \"1:2\"\n");
    let file = Recipe::parse(&text).unwrap().files.remove(0);
    assert_eq!((file.mode, file.uid, file.gid, file.content.as_str()), (0o4755, 1, 2, "a"));
}

#[test]
fn the_key_is_that_of_the_text() {
    let key = Recipe::parse(TINY).unwrap().key();
    assert_eq!(key, Recipe::parse(TINY).unwrap().key());
    assert_ne!(key, Recipe::parse(&format!("{TINY}\n")).unwrap().key());
}

/// A recipe with more lines at its top, and the place of its mistake.
fn with(lines: &str) -> Result<Recipe, (usize, usize, String)> {
    Recipe::parse(&TINY.replacen("\n", &format!("\n{lines}\n"), 1)).map_err(|e| (e.line, e.column, e.reason))
}

#[test]
fn a_locale_is_made_and_set() {
    let recipe = with("locale = \"C.UTF-8\"").unwrap();
    assert_eq!((recipe.packages.len(), recipe.locale_maker()), (1, None));
    let german = with("locale = \"de_DE.UTF-8@euro\"\nsession = { command = [\"x\"] }").unwrap();
    assert_eq!(german.packages, ["busybox", "locales"]);
    assert_eq!(german.config().session.as_ref().unwrap().env["LANG"], "de_DE.UTF-8@euro");
    assert_eq!(german.files[0].content, "LANG=de_DE.UTF-8@euro\n");
    let made = german.locale_maker().unwrap().join(" ");
    assert_eq!(made, "localedef --no-archive -i de_DE@euro -f UTF-8 de_DE.UTF-8@euro");
    // What the recipe says itself stays.
    let own = with("locale = \"fr_FR.UTF-8\"\nsession = { command = [\"x\"], env = { LANG = \"C\" } }").unwrap();
    assert_eq!(own.config().session.as_ref().unwrap().env["LANG"], "C");
    for bad in [
        "",
        "C",
        "de",
        "de_DE",
        "de_DE.ISO-8859-1",
        "../de_DE.UTF-8",
        "-f_DE.UTF-8",
        "de_DE.UTF-8@../x",
        "de_DE\\n.UTF-8",
    ] {
        let (line, column, reason) = with(&format!("locale = \"{bad}\"")).unwrap_err();
        assert_eq!((line, column), (2, 10), "{bad}: {reason}");
        assert!(reason.contains("no locale"), "{reason}");
    }
}

#[test]
fn machines_are_born_as_a_flavour_says_and_not_both_ways() {
    let born = |lines: &str| with(lines).unwrap().config().defaults.machine;
    assert!(born("").is_usual());
    let machine = born("defaults = { machine = { template = true, ready = 4 } }");
    assert_eq!((machine.template, machine.ready), (Some(true), Some(4)));
    assert_eq!(born("defaults = { machine = { template = false, ready = 0 } }").template, Some(false));
    // What is not said is not in the image either: its digest stays what it was.
    let written = serde_json::to_string(with("").unwrap().config()).unwrap();
    assert!(!written.contains("machine"), "{written}");
    for (lines, column, says) in [
        ("defaults = { machine = { template = false, ready = 1 } }", 12, "leave out `ready`"),
        ("defaults = { machine = { ready = 300 } }", 34, "300"),
        ("defaults = { machine = { ready = -1 } }", 34, "-1"),
        ("defaults = { machine = { template = \"yes\" } }", 37, "boolean"),
        ("defaults = { machine = { pool = 1 } }", 26, "pool"),
    ] {
        let (line, at, reason) = with(lines).unwrap_err();
        assert_eq!((line, at), (2, column), "{lines}: {reason}");
        assert!(reason.contains(says), "{reason}");
    }
}

#[test]
fn limits_are_some_and_say_where_they_are_wrong() {
    let recipe = with("limits = { size = \"2GiB\", entries = 1000 }").unwrap();
    assert_eq!((recipe.limits.size, recipe.limits.entries), (Some(Bytes::gib(2)), Some(1000)));
    for (lines, column, says) in [
        ("limits = { size = 0 }", 19, "zero bytes"),
        ("limits = { entries = 0 }", 22, "zero entries"),
        ("limits = { size = \"2 apples\" }", 19, "whole number"),
        ("limits = { size = -1 }", 19, ""),
        ("limits = { entries = \"many\" }", 22, ""),
        ("limits = { files = 3 }", 12, "files"),
    ] {
        let (line, at, reason) = with(lines).unwrap_err();
        assert_eq!((line, at), (2, column), "{lines}: {reason}");
        assert!(reason.contains(says), "{reason}");
    }
}

#[test]
fn hostile_recipes_are_refused_with_the_place_of_the_mistake() {
    let deep = format!("services = {}{}", "[".repeat(10_000), "]".repeat(10_000));
    let long = format!("description = \"{}\"", "x".repeat(RECIPE_MAX_BYTES));
    for (lines, says) in [
        (deep.as_str(), ""),
        (long.as_str(), "longer than"),
        ("exclude = [\"relative\"]", ""),
        ("remove = [\"/../../etc\"]", ""),
        ("run = [[\"\"]]", "needs a program"),
        ("run = [[\"sh\", \"a\\u0000b\"]]", "NUL"),
        ("services = [[]]", "needs a program"),
        ("defaults = { calls = \"system\" }", "own init"),
        ("defaults = { calls = \"all\" }", "unknown variant"),
        ("defaults = { devices = [\"tape\"] }", "unknown variant"),
        ("name = \"again\"", "duplicate key"),
        ("session = { command = [\"x\"], env = { \"A=B\" = \"c\" } }", "environment"),
    ] {
        let (line, column, reason) = with(lines).unwrap_err();
        assert!(line >= 1 && column >= 1 && reason.len() < 500, "{reason}");
        assert!(reason.contains(says), "{reason}");
    }
    for package in ["--option=x", "-y", "a b", "a;b", "a/bookworm", "$(id)", "./x.deb", "A", "a\\nb", ""] {
        let text = TINY.replace("\"busybox\"", &format!("\"busybox\", \"{package}\""));
        let error = Recipe::parse(&text).unwrap_err();
        assert_eq!((error.line, error.column), (3, 24), "{package}: {error}");
    }
}

#[test]
fn the_recipes_that_come_along_are_sound() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let recipe = Recipe::parse(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(path.file_stem().unwrap(), recipe.flavour().as_str());
        assert_eq!(recipe.config().session.as_ref().unwrap().env["LANG"], "C.UTF-8");
        assert!(recipe.limits.size.is_some() && recipe.limits.entries.is_some());
        names.push(recipe.flavour().as_str().to_owned());
    }
    names.sort();
    assert_eq!(names, ["gnome", "icewm", "kde", "lxde", "xfce"]);
}
