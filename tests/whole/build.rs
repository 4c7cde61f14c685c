//! The same recipe on the same packages is the same tree, whenever it is built.

use std::path::PathBuf;

use qvd_storage::{
    BuildOptions, Image, Recipe, Repository, Store,
    repository::{Content, TreeId},
};
use qvd_testkit::{Need, privileged};

fn tree(content: &Content) -> TreeId {
    match content {
        Content::Tree { id, .. } => *id,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_recipe_that_is_built_again_gives_the_same_tree() {
    privileged(&[Need::Root, Need::Env("QVD_TEST_STORE"), Need::Program("mmdebstrap")], || {
        let built_before = PathBuf::from(std::env::var_os("QVD_TEST_STORE").unwrap()).join("images");
        let before = Repository::open(&built_before).unwrap();
        let before = before.commit(before.resolve(&"icewm".parse().unwrap()).unwrap()).unwrap();
        let recipe = Recipe::parse(&std::fs::read_to_string("recipes/icewm.toml").unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let build = |name: &str| -> Image {
            let store = Store::open(&dir.path().join(name)).unwrap();
            let image = store.build(&recipe, &BuildOptions::default(), &mut |_| ()).unwrap().image;
            store.empty_trash().unwrap();
            image
        };
        let again = build("again");
        if again.commit().packages == before.packages {
            assert_eq!(tree(&again.commit().content), tree(&before.content));
        } else {
            // The distribution has newer packages than the store: the next build has the same.
            assert_eq!(tree(&build("once-more").commit().content), tree(&again.commit().content));
        }
    });
}
