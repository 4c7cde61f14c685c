//! Patterns for paths in a tree: `*` and `?` within a name, never across `/`.

use crate::recipe::absolute;

/// A pattern for paths in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Glob {
    parts: Vec<String>,
}

impl Glob {
    /// Reads a pattern such as `/usr/share/locale/*`.
    pub(crate) fn parse(pattern: &str) -> Result<Self, String> {
        absolute(pattern)?;
        Ok(Self { parts: pattern.split('/').skip(1).map(str::to_owned).collect() })
    }

    /// The patterns of the names along the path, outermost first.
    pub(crate) fn parts(&self) -> &[String] {
        &self.parts
    }
}

/// Whether `name` matches the pattern of one name.
pub(crate) fn matches(pattern: &[u8], name: &[u8]) -> bool {
    // The classic two-pointer match: a mismatch goes back to the last `*` and
    // lets it take one byte more. Linear in practice, quadratic at worst.
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while let Some(byte) = name.get(n) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(wanted) if *wanted == b'?' || wanted == byte => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|rest| *rest == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_patterns() {
        for (pattern, name) in
            [("*", "a"), ("*", ""), ("a*b", "ab"), ("a*b", "axxb"), ("?", "x"), ("*.so.*", "l.so.so.1")]
        {
            assert!(matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
        for (pattern, name) in [("", "a"), ("a", ""), ("a*b", "abc"), ("?", "xy"), ("a", "b"), ("*a", "ab")] {
            assert!(!matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
    }
}
