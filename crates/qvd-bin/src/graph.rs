//! The history of a flavour as a drawing of characters.

use qvd_storage::repository::{CommitId, Logged};

use crate::{
    history::short,
    output::{age, one_line},
};

/// Draws a log: a line for each commit, its lane marked, lanes that go on
/// beside it, and where lanes part.
pub(crate) fn draw(log: &[Logged]) -> String {
    let mut lanes: Vec<CommitId> = Vec::new();
    let mut lines = Vec::new();
    for commit in log {
        let lane = lanes.iter().position(|id| *id == commit.id).unwrap_or_else(|| {
            lanes.push(commit.id);
            lanes.len() - 1
        });
        let marks: Vec<&str> = (0..lanes.len()).map(|at| if at == lane { "*" } else { "|" }).collect();
        let tags: Vec<&str> = commit.tags.iter().map(qvd_core::Tag::as_str).collect();
        let tags = if tags.is_empty() { String::new() } else { format!(" ({})", tags.join(", ")) };
        let (age, author) = (age(commit.time_unix_s), one_line(&commit.author));
        let text = format!(
            "{}{tags} {age} ago, {author}: {}",
            short(commit.id),
            one_line(commit.message.lines().next().unwrap_or_default())
        );
        lines.push(format!("{} {text}", marks.join(" ")));
        let before = lanes.len();
        lanes.remove(lane);
        for (number, parent) in commit.parents.iter().enumerate() {
            if !lanes.contains(parent) {
                lanes.insert((lane + number).min(lanes.len()), *parent);
            }
        }
        if lanes.len() > before {
            lines.push((0..before).map(|at| if at == lane { "|\\" } else { "|" }).collect::<Vec<_>>().join(" "));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn commit(id: u8, parents: &[u8]) -> Logged {
        let id_of =
            |number: u8| -> CommitId { format!("sha256:{}", format!("{number:02x}").repeat(32)).parse().unwrap() };
        serde_json::from_value(serde_json::json!({
            "id": id_of(id), "flavour": "f", "parents": parents.iter().map(|p| id_of(*p)).collect::<Vec<_>>(),
            "author": "a", "time_unix_s": 0, "message": "m", "tags": [],
            "content": {"tree": {"id": format!("sha256:{}", "00".repeat(32)), "entries": 1, "size_bytes": 0}},
        }))
        .unwrap()
    }

    #[test]
    fn a_commit_is_one_line_by_the_first_of_its_message() {
        let mut long = commit(1, &[]);
        long.message = "why\n\nLeft out:\n/etc/machine-id".to_owned();
        assert!(draw(&[long.clone()]).ends_with(": why"), "{}", draw(&[long]));
    }

    #[test]
    fn lanes_part_and_meet() {
        let log = [commit(4, &[3, 2]), commit(3, &[1]), commit(2, &[1]), commit(1, &[])];
        let drawn = draw(&log);
        let shapes: Vec<String> = drawn
            .lines()
            .map(|line| line.chars().take_while(|c| "*|\\ ".contains(*c)).collect::<String>().trim_end().to_owned())
            .collect();
        assert_eq!(shapes, ["*", "|\\", "* |", "| *", "*"]);
    }
}
